"""The command line: `hf-prune analyze|plan MODEL`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.errors import HfPruneError, ModelLoadError

app = typer.Typer(help="Prune HuggingFace and timm vision models.", no_args_is_help=True, add_completion=False)

Model = Annotated[str, typer.Argument(help="Hub id, local folder, or timm name.")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels; default: what the model was made for.")]
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
    macs: Annotated[float | None, typer.Option(help="Budget: fraction of dense up to 1, else absolute.")] = None,
    params: Annotated[float | None, typer.Option(help="Budget: fraction of dense up to 1, else absolute.")] = None,
    criterion: Annotated[str, typer.Option(help="How units are scored; one that needs no data.")] = "magnitude",
    allocator: Annotated[str, typer.Option(help="uniform, global_rank or isomorphic.")] = "isomorphic",
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
            budget=Budget(macs=macs, params=params),
            criterion=criterion,
            allocator=allocator,
            limits=Limits(round_to=round_to, protect=protect or ()),
        )
        decided.write(output)
    for name, units in decided.kept.items():
        typer.echo(f"{name}: {len(units)} of {decided.sizes[name]}")


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
