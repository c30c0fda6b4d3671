"""The command line: `hf-prune analyze|plan|prune|measure|latency-table|card|push`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.errors import HfPruneError, ModelLoadError

app = typer.Typer(help="Prune HuggingFace and timm vision models.", no_args_is_help=True, add_completion=False)

Model = Annotated[str, typer.Argument(help="Hub id, local folder, or timm name.")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels; default: what the model was made for.")]
Macs = Annotated[float | None, typer.Option(help="Budget of multiply-accumulates: up to 1 of dense, else absolute.")]
Params = Annotated[float | None, typer.Option(help="Budget of parameters: up to 1 a fraction of dense, else absolute.")]
Latency = Annotated[float | None, typer.Option(help="Budget of milliseconds a batch here: up to 1 of dense, else ms.")]
LatencyBatch = Annotated[int, typer.Option(help="Images a batch, for a budget of latency.")]
Table = Annotated[Path | None, typer.Option("--latency-table", help="A table measured before, instead of a new one.")]
Pretrained = Annotated[bool, typer.Option(help="Load weights; without them a timm model is built at random.")]


@app.callback()
def main() -> None:
    """Prune HuggingFace and timm vision models."""


@app.command()
def analyze(model: Model, image_size: ImageSize = None, pretrained: Pretrained = True) -> None:
    """Show what can be pruned, how large it is, and what must stay, with the reason."""
    from hf_prune import pipeline

    with _plain_errors():
        network = load_any(model, pretrained=pretrained)
        graph = pipeline.analyze(network, _inputs(image_size))
    typer.echo(graph.table())


@app.command()
def plan(
    model: Model,
    output: Annotated[Path, typer.Option(help="JSON file to write.")],
    macs: Macs = None,
    params: Params = None,
    latency_ms: Latency = None,
    latency_batch: LatencyBatch = 1,
    latency_table: Table = None,
    criterion: Annotated[str, typer.Option(help="How units are scored; one that needs no data.")] = "magnitude",
    allocator: Annotated[str, typer.Option(help="uniform, global_rank, isomorphic or knapsack.")] = "isomorphic",
    round_to: Annotated[int, typer.Option(help="Sizes become multiples of this.")] = 1,
    protect: Annotated[list[str] | None, typer.Option(help="Pattern of axes that stay whole; may be repeated.")] = None,
    image_size: ImageSize = None,
    pretrained: Pretrained = True,
) -> None:
    """Decide which units stay within a budget, and write the decision as JSON."""
    from hf_prune import pipeline
    from hf_prune.allocate.allocators import Limits
    from hf_prune.allocate.budget import Budget

    with _plain_errors():
        network = load_any(model, pretrained=pretrained)
        decided = pipeline.plan(
            network,
            _inputs(image_size),
            budget=Budget(macs=macs, params=params, latency_ms=latency_ms),
            criterion=criterion,
            allocator=allocator,
            limits=Limits(round_to=round_to, protect=protect or ()),
            table=_table(latency_table),
            batch_size=latency_batch,
        )
        decided.write(output)
    for name, units in decided.kept.items():
        typer.echo(f"{name}: {len(units)} of {decided.sizes[name]}")


@app.command()
def prune(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder to save to.")],
    macs: Macs = None,
    params: Params = None,
    latency_ms: Latency = None,
    latency_batch: LatencyBatch = 1,
    latency_table: Table = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="A plan made before, instead of a budget.")] = None,
    criterion: Annotated[str, typer.Option(help="How units are scored; one that needs no data.")] = "magnitude",
    allocator: Annotated[str, typer.Option(help="uniform, global_rank, isomorphic or knapsack.")] = "isomorphic",
    round_to: Annotated[int, typer.Option(help="Sizes become multiples of this.")] = 1,
    image_size: ImageSize = None,
    pretrained: Pretrained = True,
    batch_size: Annotated[list[int] | None, typer.Option(help="Batches to time; may be repeated.")] = None,
) -> None:
    """Prune a model without training, measure it beside the dense one, and save it with a card.

    Accuracy falls: train the model afterwards.
    """
    import copy

    import hf_prune
    from hf_prune.allocate.plan import Plan

    with _plain_errors():
        network = load_any(model, pretrained=pretrained).eval()
        dense, inputs = copy.deepcopy(network), _inputs(image_size)
        graph = hf_prune.analyze(network, inputs)
        if plan_file is not None:
            decided = Plan.read(plan_file)
        else:
            decided = hf_prune.plan(
                network,
                graph=graph,
                budget=hf_prune.Budget(macs=macs, params=params, latency_ms=latency_ms),
                criterion=criterion,
                allocator=allocator,
                limits=hf_prune.Limits(round_to=round_to),
                table=_table(latency_table),
                batch_size=latency_batch,
            )
        record = hf_prune.apply_plan(network, decided, graph)
        found = hf_prune.compare(dense, network, inputs, batch_sizes=batch_size or (1, 16))
        base, license_name = _provenance(model, network) if pretrained else (None, None)
        hf_prune.save(network, output, base_model=base, processor=_processor(model), measurements=found)
        hf_prune.write_card(output, license_name=license_name)
    for title, (before, after) in (("parameters", record.params), ("MACs", record.macs)):
        typer.echo(f"{title}: {before:,} -> {after:,} ({after / before:.0%})")
    for size, pair in found["batches"].items():
        before, after = pair["dense"]["latency"]["median_ms"], pair["pruned"]["latency"]["median_ms"]
        typer.echo(f"ms per batch of {size}: {before:.2f} -> {after:.2f} ({before / after:.2f}x as fast)")
    typer.echo(f"saved in {output}")


@app.command()
def measure(model: Model, batch_size: int = 1, image_size: ImageSize = None, pretrained: Pretrained = True) -> None:
    """Measure parameters, MACs and latency of a model, dense or pruned, on this machine."""
    import hf_prune

    with _plain_errors():
        found = hf_prune.measure(load_any(model, pretrained=pretrained), _inputs(image_size), batch_size=batch_size)
    typer.echo(json.dumps(found.to_json(), indent=1))


@app.command()
def latency_table(
    model: Model,
    output: Annotated[Path, typer.Option(help="JSON file to write.")],
    batch_size: int = 1,
    tokens: Annotated[
        bool, typer.Option(help="Blocks at many token counts, for SPViT, in place of operators.")
    ] = False,
    image_size: ImageSize = None,
    pretrained: Pretrained = True,
) -> None:
    """Time every operator of a model at many sizes on this machine, for budgets of milliseconds."""
    from hf_prune import pipeline
    from hf_prune.measure.latency_table import measure_latency_table

    with _plain_errors():
        network = load_any(model, pretrained=pretrained).eval()
        if tokens:
            _measure_tokens(network, batch_size).write(output)
        else:
            graph = pipeline.analyze(network, _inputs(image_size))
            table = measure_latency_table(network, graph, batch_size=batch_size)
            table.write(output)
            for title, both in (("dense model", table.dense), ("a quarter of every width", table.quarter)):
                found = f"{both.whole_ms:.2f} ms, operators added up {both.sum_ms:.2f} ms"
                typer.echo(f"{title}: {found} ({both.additivity_error:+.1%})")
    typer.echo(f"written to {output}")


@app.command()
def card(folder: Annotated[Path, typer.Argument(help="Folder of a saved model.")], model_id: str | None = None) -> None:
    """Write the model card again, from what was recorded when the model was pruned and measured."""
    import hf_prune

    with _plain_errors():
        typer.echo(f"written to {hf_prune.write_card(folder, model_id=model_id)}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    private: Annotated[bool | None, typer.Option(help="Who may see a repository made here.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if there is none yet.")] = None,
) -> None:
    """Upload a saved model with its card, in one commit."""
    import hf_prune

    with _plain_errors():
        hf_prune.write_card(folder, model_id=repo_id)
        typer.echo(hf_prune.push_folder(folder, repo_id, private=private, revision=revision))


def _table(path: Path | None) -> Any:
    from hf_prune.measure.latency_table import LatencyTable

    return None if path is None else LatencyTable.read(path)


def _measure_tokens(network: Any, batch_size: int) -> Any:
    from hf_prune.analyse.inputs import inputs_for
    from hf_prune.measure.token_table import measure_token_table
    from hf_prune.tokens.config import TokenPruningConfig
    from hf_prune.tokens.site import find_site

    settings = TokenPruningConfig(before_blocks=(1,), keep_ratios=(0.5,), num_heads=find_site(network).num_heads)
    image = inputs_for(network)
    pixels = (image["pixel_values"] if isinstance(image, dict) else image).repeat(batch_size, 1, 1, 1)
    return measure_token_table(network, pixels, settings)


def _provenance(name: str, model: Any) -> tuple[str | None, str | None]:
    """Return the Hub id of the weights that were loaded, and their licence, as far as both are known."""
    from hf_prune.models import card_license

    configuration = getattr(model, "pretrained_cfg", None)
    if isinstance(configuration, dict):
        return configuration.get("hf_hub_id"), configuration.get("license")
    return (name if name.count("/") == 1 and not Path(name).exists() else None), card_license(name)


def _processor(name: str) -> Any:
    """Return the image processor beside a model of transformers, if there is one."""
    import timm
    import transformers

    if timm.is_model(name) or name.startswith(("timm/", "hf-hub:", "local-dir:")):
        return None
    try:
        return transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        return None


def load_any(name: str, *, pretrained: bool = True) -> Any:
    """Load a model of any task by Hub id, folder or timm name.

    Raises:
        ModelLoadError: If nothing can be loaded under that name.
    """
    import timm
    import transformers

    try:
        if "/" not in name and timm.is_model(name):
            return timm.create_model(name, pretrained=pretrained)
        if name.startswith(("timm/", "hf-hub:", "local-dir:")):
            return timm.create_model(name.replace("timm/", "hf-hub:timm/", 1), pretrained=pretrained)
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        kind = getattr(transformers, architecture, transformers.AutoModel)
        return kind.from_pretrained(name)
    except Exception as err:
        # timm, transformers and huggingface_hub raise whatever their downloads, registries or builders raise.
        raise ModelLoadError(f"no model could be loaded as '{name}': {err}") from err


def _inputs(image_size: int | None) -> Any:
    import torch

    return None if image_size is None else torch.zeros(1, 3, image_size, image_size)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn the library's errors into one line and exit status 1."""
    try:
        yield
    except HfPruneError as err:
        typer.echo(f"{type(err).__name__}: {err}", err=True)
        raise typer.Exit(1) from err
