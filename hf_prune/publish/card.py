"""The model card: what a run's report holds, as Hub metadata and a page to read."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_prune.errors import HfPruneError
from hf_prune.measure.report import Report, comparison, stage_table, target_line
from hf_prune.publish.token_methods import METHODS
from hf_prune.tokens.reducers.registry import reducer_class

TAGS = ("hf_prune", "pruning", "token-pruning")


def render_card(
    report: Report,
    *,
    load_snippet: str,
    model_id: str | None = None,
    pipeline_tag: str = "image-classification",
    library_name: Literal["transformers", "timm"] = "transformers",
) -> ModelCard:
    """Return the card of a pruned model; it says nothing that the report does not hold.

    Args:
        report: Evidence of the run.
        load_snippet: Python line that loads the model; `import hf_prune` is put before it if missing.
        model_id: Hub id that the model will have; None if it stays local.
        pipeline_tag: Task of the model in the Hub's words.
        library_name: Library whose loader reads the model.

    Raises:
        HfPruneError: If the report is of a method that the card's text does not describe.
    """
    if report.method not in METHODS:
        raise HfPruneError(
            f"the card must be of a method on tokens ({', '.join(METHODS)}), got a report of {report.method!r}; "
            "add the text on that method to 'token_methods.py'"
        )
    title = model_id or (f"{_name(report.base_model)}-{report.method}" if report.base_model else report.method)
    tags = (*TAGS, report.method)
    data = metadata(report, title=title, pipeline_tag=pipeline_tag, library_name=library_name, tags=tags)
    body = (
        environment()
        .get_template("card.md.jinja")
        .render(
            report=report,
            method=METHODS[report.method],
            is_adaptive=reducer_class(report.method).adaptive,
            title=title,
            subject=_code(_name(report.base_model)) if report.base_model else "a vision transformer",
            licence=data.license,
            load_snippet=load_snippet.strip(),
            comparison=comparison(report),
            stages=stage_table(report),
            target_line=target_line(report.target) if report.target else "",
            versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
        )
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def metadata(
    report: Report, *, title: str, pipeline_tag: str, library_name: str | None, tags: Sequence[str]
) -> ModelCardData:
    """Return what the Hub is told about a model whose run left a report."""
    base_model, dataset = hub_id(report.base_model), hub_id(report.dataset)
    accuracy = EvalResult(
        task_type=pipeline_tag,
        dataset_type=dataset or _name(report.dataset),
        dataset_name=_name(report.dataset),
        dataset_split=report.split,
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=report.pruned.top1,
    )
    return ModelCardData(
        library_name=library_name,
        # Weights that this run trained are ours to license; those of others keep the licence they have.
        license=report.base_license or ("unknown" if report.base_model else "apache-2.0"),
        base_model=base_model,
        # "finetune" is the closest of the Hub's relations: it has none for pruning.
        base_model_relation="finetune" if base_model else None,
        pipeline_tag=pipeline_tag,
        tags=[*tags],
        datasets=[dataset] if dataset else None,
        metrics=["accuracy"],
        model_name=title.rpartition("/")[2] or title,
        eval_results=[accuracy],
    )


def hub_id(name: str | None) -> str | None:
    """Return `name` if it is an "owner/name" on the Hub rather than a folder or an embedded data set."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _name(source: str) -> str:
    """Return a Hub id whole, but of a path the last part only: a card is no place for a machine's folders."""
    return hub_id(source) or Path(source).name or source


def environment() -> Environment:
    """Return where the templates of cards are, with filters that escape for Markdown."""
    made = Environment(
        loader=PackageLoader("hf_prune", "publish"),
        # The page is Markdown, not HTML: the filters below do the escaping that Markdown needs.
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        plain=_plain,
        code=_code,
        name=_name,
        table=_table,
        verbatim=_verbatim,
        caption=_caption,
        duration=_duration,
    )
    return made


def _plain(text: str) -> str:
    """Escape what Markdown would read as markup, on one line."""
    return re.sub(r"([\\`*\[\]<>|#]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _verbatim(text: str) -> str:
    """Indent by four: unlike a fence, that cannot be closed by what stands in it."""
    return "\n".join("    " + line for line in text.splitlines())


def _caption(file_name: str) -> str:
    return Path(file_name).stem.replace("_", " ")


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _table(lines: list[list[str]]) -> str:
    head, *body = ([_plain(cell) for cell in line] for line in lines)
    rule = [":---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))
