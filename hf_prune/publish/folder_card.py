"""The card of a saved model that was cut: rendered from what its folder holds, and from nothing else."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_prune.errors import HfPruneError
from hf_prune.measure.report import REPORT_NAME, Report, comparison, stage_table, target_line
from hf_prune.measure.widths import plot_widths
from hf_prune.publish.card import TAGS, environment, hub_id, metadata, render_card
from hf_prune.publish.folder import CONFIG
from hf_prune.publish.save import HISTORY_FILE, MEASUREMENTS_FILE
from hf_prune.publish.token_methods import METHODS as TOKEN_METHODS
from hf_prune.publish.token_methods import sentences, tokens_in

WIDTHS = "figures/widths.png"
# What recipes do, in the words of a card; their files say it at length.
METHODS = {
    "heads": "Heads and MLP neurons were scored on training images and cut to a budget; after that the model was "
    "trained on labels and on the logits of the dense one.",
    "channels": "Channels were scored on training images and cut to a budget; after that the model was trained on "
    "labels and on the logits of the dense one.",
    "cop": "COP (Yang et al., One-cut Network Pruning at Initialization with Explainable Image Concepts, PRMU 2022): a "
    "teacher told which parts of images speak for which class; units were scored once on images made of such concepts, "
    "and cut before training on labels.",
    "joint": "Schedules of tokens, each with the heads and MLP neurons that one budget leaves beside it, were compared "
    "on training images, and the one was taken that changed the answers of the dense model least; after that the model "
    "was trained on labels and on the logits of the dense one.",
    "smcp": "SMCP (Humble et al., Soft Masking for Cost-Constrained Channel Pruning, ECCV 2022): masks on what layers "
    "read, decided again and again by a knapsack while masked weights go on learning, became a cut in the end.",
}


def write_card(folder: str | Path, *, model_id: str | None = None, license_name: str | None = None) -> Path:
    """Write `README.md` into the folder of a saved model, and the picture of its widths.

    What is on it comes from the config, `pruning_history.json`, `measurements.json` and, where a recipe left one,
    `report.json`. What was not measured is said not to be.

    Args:
        folder: What `hf_prune.save` wrote.
        model_id: Hub id that the model will have; None if it stays local.
        license_name: Licence of the dense weights; None takes the one on the card that is there already.

    Returns:
        The path of the card.

    Raises:
        HfPruneError: If the folder holds no pruned model.
    """
    folder = Path(folder)
    license_name = license_name or _license_on(folder / "README.md")
    report = Report.read(folder) if (folder / REPORT_NAME).is_file() else None
    if report is not None and report.method in TOKEN_METHODS:
        card = _card_of_run(folder, report, model_id)
    else:
        card = _card_of_cut(folder, report, model_id, license_name)
    temporary = folder / ".README.md.tmp"
    temporary.write_text(str(card), encoding="utf-8")
    return temporary.replace(folder / "README.md")


def _license_on(card: Path) -> str | None:
    if not card.is_file():
        return None
    name = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("license")
    return name if isinstance(name, str) and name != "unknown" else None


def _card_of_run(folder: Path, report: Report, model_id: str | None) -> ModelCard:
    config = _read(folder / CONFIG)
    library = "transformers" if "model_type" in config else "timm"
    snippet = f'model = hf_prune.load("{model_id or folder.name}")'
    return render_card(report, load_snippet=snippet, model_id=model_id, library_name=library)


def _card_of_cut(folder: Path, report: Report | None, model_id: str | None, license_name: str | None) -> ModelCard:
    config = _read(folder / CONFIG)
    manifest = config.get("hf_prune") or (config.get("model_args") or {}).get("manifest")
    history, tokens = _read(folder / HISTORY_FILE, default=[]), tokens_in(manifest)
    if not history and tokens is None:
        raise HfPruneError(
            f"'{folder / HISTORY_FILE}' must tell what was done to the model; save the model with `hf_prune.save`"
        )
    widths = widths_of(history)
    if widths:
        plot_widths(widths, folder / WIDTHS)
    base, name = (manifest or history[0]).get("base_model"), model_id or folder.resolve().name
    library = "transformers" if "model_type" in config else str(config.get("library", "timm"))
    measured = _read(folder / MEASUREMENTS_FILE, default={})
    kinds = (*(("structured-pruning",) if widths else ()), *(("token-pruning",) if tokens else ()))
    data = _metadata(config, report, kinds, library=library, base=base, title=name, license_name=license_name)
    page = environment().get_template("cut.md.jinja").render(
        title=name,
        needs_import=manifest is not None,
        base=base,
        is_drawn=any(step["plan"]["how"].get("weights") == "random" for step in history if step["plan"]["how"]),
        licence=None if data.license == "unknown" else data.license,
        load_snippet=_snippet(config, library, model_id or folder.resolve().name, needs_import=manifest is not None),
        before_after=_before_after(history, measured) if report is None else comparison(report),
        measured=measured,
        report=report,
        method=None if report is None else METHODS[report.method],
        target_line="" if report is None or report.target is None else target_line(report.target),
        versions="" if report is None else ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        history=history,
        changes=" and ".join((*(("fewer heads, neurons or channels",) if widths else ()),
                              *(("fewer patch tokens on the way",) if tokens else ()))),
        widths=widths,
        tokens=tokens and sentences(tokens),
        stages=stage_table(report) if report is not None and report.stages else None,
        figures=(*((WIDTHS,) if widths else ()), *(() if report is None else report.figures)),
    )  # fmt: skip
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{page}")


def _metadata(
    config: Mapping[str, Any],
    report: Report | None,
    kinds: tuple[str, ...],
    *,
    library: str,
    base: str | None,
    title: str,
    license_name: str | None,
) -> ModelCardData:
    name, task = None if library == "torch" else library, _task(config, library)
    tags = (*TAGS[:2], *kinds)
    if report is not None:
        return metadata(
            report,
            title=title,
            pipeline_tag=task or "image-classification",
            library_name=name,
            tags=(*tags, report.method),
        )
    return ModelCardData(
        library_name=name,
        license=license_name or "unknown",
        base_model=hub_id(base),
        base_model_relation="finetune" if hub_id(base) else None,
        pipeline_tag=task,
        tags=[*tags],
        model_name=title.rpartition("/")[2],
    )


def _task(config: Mapping[str, Any], library: str) -> str | None:
    architecture = str((config.get("architectures") or [""])[0])
    ends = {
        "ForImageClassification": "image-classification",
        "ForSemanticSegmentation": "image-segmentation",
        "ForInstanceSegmentation": "image-segmentation",
        "ForObjectDetection": "object-detection",
        "ForDepthEstimation": "depth-estimation",
    }
    found = [task for end, task in ends.items() if architecture.endswith(end)]
    if found:
        return found[0]
    return "image-classification" if library == "timm" and config.get("num_classes") else "image-feature-extraction"


def _snippet(config: Mapping[str, Any], library: str, name: str, *, needs_import: bool) -> str:
    if library == "timm":
        source = "hf-hub" if "/" in name else "local-dir"
        return f'import hf_prune\nimport timm\n\nmodel = timm.create_model("{source}:{name}", pretrained=True)'
    if library == "torch":
        return f'import hf_prune\n\nmodel = hf_prune.load("{name}", constructor={config.get("class", "Model")})'
    kind = (config.get("architectures") or ["AutoModel"])[0]
    first = "import hf_prune\n" if needs_import else ""
    return f'{first}from transformers import {kind}\n\nmodel = {kind}.from_pretrained("{name}")'


def widths_of(history: list[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return the size of every axis that was cut, before the first cut and after the last."""
    found: dict[str, tuple[int, int]] = {}
    for step in history:
        plan = step["plan"]
        for name, kept in plan["kept"].items():
            found[name] = (found.get(name, (plan["sizes"][name], 0))[0], len(kept))
    return found


def _before_after(history: list[Mapping[str, Any]], measured: Mapping[str, Any]) -> list[list[str]]:
    lines = [["", "dense", "pruned", "change"]]
    for title, key in (("parameters", "params"), ("MACs per image", "macs")) if history else ():
        before, after = history[0][key][0], history[-1][key][1]
        lines.append([title, f"{before:,}", f"{after:,}", f"{100 * (after / before - 1):+.1f}%"])
    for size, pair in sorted(measured.get("batches", {}).items(), key=lambda item: int(item[0])):
        dense, pruned = pair["dense"]["latency"]["median_ms"], pair["pruned"]["latency"]["median_ms"]
        lines.append([f"ms per batch of {size}", f"{dense:.2f}", f"{pruned:.2f}", f"{dense / pruned:.2f}x as fast"])
    return lines


def _read(path: Path, default: Any = None) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        if default is not None:
            return default
        raise HfPruneError(f"'{path}' must be there: `hf_prune.save` writes it") from err
    except (OSError, ValueError, RecursionError) as err:
        raise HfPruneError(f"'{path}' must be readable JSON: {err}") from err
