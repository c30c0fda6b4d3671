"""Let what remains say what was removed: kept weights fitted to the outputs of the dense model, without labels."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.pytorch_utils import Conv1D

from hf_prune.allocate.plan import Plan
from hf_prune.analyse.axes import Axis, kept_indices
from hf_prune.analyse.graph import AxisGraph
from hf_prune.analyse.running import quiet_run
from hf_prune.errors import CompensationError
from hf_prune.recover.norms import images_of

How = Literal["mean", "least_squares"]
# Positions looked at for every unknown: enough, and memory stays bounded. Fewer than the least fit noise.
MOST_ROWS, LEAST_ROWS = 32, 4
# Positions that are always looked at if there are so many: they cost little.
FREE_ROWS = 4096
# Of the mean square of the inputs. It pulls towards the weights as they were.
RIDGE = 1e-4
# Images unfolded at once.
CHUNK = 16


@dataclass
class Reader:
    """A layer whose weights are fitted again.

    Attributes:
        path: Of the layer.
        layer: In the dense model; its kept weights change in place.
        inputs: Kept input channels.
        outputs: Kept output channels.
        num_positions: Outputs that the dense layer gave: images times places in them.
        rows: Which of them are looked at, ascending.
        target: `(rows, kept outputs)`, what the dense layer said there.
        mean: `(kept outputs,)`, what it said in the mean of all.
        norm: The batch norm right behind it, if there is one.
        num_calls: How often it ran.
    """

    path: str
    layer: nn.Module
    inputs: Tensor
    outputs: Tensor
    num_positions: int = 0
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    target: Tensor = field(default_factory=lambda: torch.zeros(0))
    mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    norm: str | None = None
    num_calls: int = 0

    @property
    def num_unknowns(self) -> int:
        """Weights of one output."""
        return len(self.inputs) * (self.layer.weight[0, 0].numel() if isinstance(self.layer, nn.Conv2d) else 1)


@contextmanager
def compensated(
    model: nn.Module, graph: AxisGraph, plan: Plan, data: Iterable[Any] | None, *, how: How = "least_squares"
) -> Iterator[None]:
    """Change the weights that a plan keeps so that the cut model comes near the dense one; cut inside the `with`.

    The dense model and a cut copy see the same images. Layer by layer in the order of the run, what the layer of the
    copy reads is what the layers before it, cut and compensated, really give, and it is fitted to the outputs of the
    dense layer:

    - "least_squares": weights and bias by ridge regression, the optimum of the squared error of the layer's output for
      linear layers and convolutions alike (at the positions looked at, but for the ridge).
    - "mean": the bias alone, which takes over the mean of what is missing.

    A layer without bias gives its constant to the running mean of a batch norm right behind it, and is fitted
    through the origin where there is none. Layers that lose no input are fitted as well, for what they read has
    changed; those before the first cut find no error to fit. Batch norms should not be recalibrated after
    "least_squares", which fits with the statistics of the dense model.

    Left alone are grouped and depthwise convolutions (a group has few inputs that could speak for one another, and
    what they pass on wrongly is fitted behind them), layers of other classes than `nn.Linear`, `nn.Conv2d` and
    transformers' `Conv1D` (what subclasses do to their weights is theirs), weights that several modules share, layers
    that run more than once, and layers that see cut channels as positions. With fewer than 4 positions a weight of one
    output, only the bias is fitted.

    Memory: a copy of the model; the activations of all images as one batch; of what each dense layer said, 32 times
    its kept weights or 4,096 positions, whichever is more; the square of the inputs (times kernel positions) of one
    layer at a time. Cost: one run of the dense model, one of the cut one in which each fitted layer runs twice, and the
    cube of the inputs of every layer.

    Source: the least-squares reconstruction of He et al., Channel Pruning for Accelerating Very Deep Neural Networks,
    ICCV 2017. Differs from it by a ridge towards the weights as they were, by constants, and by fitting layers that
    lose nothing as well.

    Args:
        model: The dense model. Kept weights change in place, shapes do not. If the body raises, they come back.
        graph: Its analysis.
        plan: What will be cut.
        data: Batches of images, a few hundred in all; see `hf_prune.score.batches`. Labels may be missing.
        how: See above.

    Raises:
        CompensationError: If `how` is unknown, or data are missing or of another form.
        HfPruneError: If the plan cannot be carried out.
    """
    if how not in ("mean", "least_squares"):
        raise CompensationError(f"`how` must be 'mean' or 'least_squares', got {how!r}")
    kept, images = plan.on(graph), torch.cat(list(images_of(model, data)))
    readers = _observe(model, _readers(model, graph, kept), images, how)
    tensors = [tensor for reader in readers for tensor in _tensors(model, reader)]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        _fit(model, graph, plan, readers, images, how)
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
        raise


def _readers(model: nn.Module, graph: AxisGraph, kept: Mapping[Axis, Tensor]) -> list[Reader]:
    """Return the layers that can be fitted."""
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    readers = []
    for path, layer in model.named_modules():
        dims = graph.recording.dims.get(f"{path}.weight")
        plain = type(layer) in (nn.Linear, Conv1D) or (
            type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )  # fmt: skip
        if not plain or dims is None or any(holders[id(p)] > 1 for p in layer.parameters()):
            continue
        inputs, outputs = (kept_indices(dims[d], dict(kept)) for d in ((0, 1) if type(layer) is Conv1D else (1, 0)))
        readers.append(Reader(path, layer, inputs, outputs))
    return readers


@torch.no_grad()
def _observe(model: nn.Module, readers: list[Reader], images: Tensor, how: How) -> list[Reader]:
    """Run the dense model and note what its layers say; return those that ran once."""
    last: list[tuple[Tensor, Reader]] = []

    def note(reader: Reader) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            said = _by_position(layer, output)[:, reader.outputs.to(output.device)]
            reader.num_calls, reader.num_positions = reader.num_calls + 1, len(said)
            reader.mean = said.float().mean(0)
            limit = max(FREE_ROWS, MOST_ROWS * reader.num_unknowns)
            if how == "least_squares":
                generator = torch.Generator().manual_seed(crc32(reader.path.encode()))
                reader.rows = torch.randperm(len(said), generator=generator)[:limit].sort().values.to(said.device)
                reader.target = said[reader.rows].float()
            last[:] = [(output, reader)]

        return hook

    def behind(path: str) -> Any:
        def hook(norm: nn.Module, args: tuple) -> None:
            if last and args and args[0] is last[0][0]:
                last[0][1].norm = path

        return hook

    with _hooks() as handles, quiet_run(model):
        handles += [reader.layer.register_forward_hook(note(reader)) for reader in readers]
        handles += [
            module.register_forward_pre_hook(behind(path))
            for path, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]
        model(images)
    return [reader for reader in readers if reader.num_calls == 1]


@torch.no_grad()
def _fit(model: nn.Module, graph: AxisGraph, plan: Plan, readers: list[Reader], images: Tensor, how: How) -> None:
    """Fit the readers one after the other while a cut copy runs."""
    from hf_prune.pipeline import apply_plan  # which imports this file

    for reader in readers:
        if not len(reader.inputs):
            # Its branch goes, and what it says is a constant, which the copy takes over when it is cut.
            bias = getattr(reader.layer, "bias", None)
            _add_constant(model, reader, reader.mean - (0 if bias is None else bias[reader.outputs]))
    twin = copy.deepcopy(model)
    apply_plan(twin, plan, graph, verify=False)
    modules = dict(twin.named_modules())

    def fit(reader: Reader) -> Any:
        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            said = _by_position(layer, output)
            if len(said) != reader.num_positions:
                return None
            x = (*args, *kwargs.values())[0]
            missing = reader.mean - said.float().mean(0)
            enough = len(reader.rows) >= LEAST_ROWS * reader.num_unknowns
            if how == "least_squares" and enough:
                centred = _constant_of(model, reader) is not None
                change, missing = _regress(_columns(layer, x, reader.rows), reader.target - said[reader.rows], centred)
                _add_weights(reader, change)
            _add_constant(model, reader, missing)
            _take_over(reader, layer, None if reader.norm is None else modules[reader.norm], model)
            return layer.forward(*args, **kwargs)

        return hook

    with _hooks() as handles, quiet_run(twin):
        for reader in readers:
            if len(reader.inputs) and reader.path in modules:
                handles.append(modules[reader.path].register_forward_hook(fit(reader), with_kwargs=True))
        twin(images)


def _regress(x: Tensor, error: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Return the weights `(inputs, outputs)` and the constant `(outputs,)` that say most of an error, in float64.

    On the CPU, for not every device knows float64. The constant is zero if `centred` is False.
    """
    x, error = x.cpu().double(), error.cpu().double()
    mean_x, mean_error = (part.mean(0) if centred else torch.zeros_like(part[0]) for part in (x, error))
    x, error = x - mean_x, error - mean_error
    square = x.T @ x
    square.diagonal().add_(RIDGE * square.diagonal().mean().clamp_min(torch.finfo(x.dtype).tiny))
    weights = torch.cholesky_solve(x.T @ error, torch.linalg.cholesky(square))
    return weights, mean_error - mean_x @ weights


def _by_position(layer: nn.Module, output: Tensor) -> Tensor:
    """Return outputs as `(positions, channels)`."""
    return (output.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else output).flatten(0, -2)


def _columns(layer: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """Return all that some outputs are sums of, as `(rows, channels times kernel positions)`."""
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2)[rows]
    found, start = [], 0
    for images in x.split(CHUNK):
        unfolded = F.unfold(images, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore
        columns = unfolded.transpose(1, 2).flatten(0, 1)
        found.append(columns[rows[(rows >= start) & (rows < start + len(columns))] - start])
        start += len(columns)
    return torch.cat(found)


def _weight(layer: nn.Module) -> Tensor:
    """Return a view of a weight with outputs first."""
    weight: Tensor = layer.weight.data  # type: ignore[assignment]
    return weight.T if isinstance(layer, Conv1D) else weight


def _constant_of(model: nn.Module, reader: Reader) -> Tensor | None:
    """Return what holds the constant of a layer: its bias, or the running mean of the norm behind it."""
    if reader.layer.bias is not None:
        return reader.layer.bias.data  # type: ignore[return-value]
    return None if reader.norm is None else model.get_submodule(reader.norm).running_mean  # type: ignore[return-value]


def _add_constant(model: nn.Module, reader: Reader, shift: Tensor) -> None:
    constant = _constant_of(model, reader)
    if constant is not None:
        sign = -1 if reader.layer.bias is None else 1
        constant[reader.outputs] += sign * shift.to(constant)


def _add_weights(reader: Reader, change: Tensor) -> None:
    weight = _weight(reader.layer)
    shape = (len(reader.outputs), len(reader.inputs), *weight.shape[2:])
    weight[reader.outputs[:, None], reader.inputs] += change.T.reshape(shape).to(weight)


def _take_over(reader: Reader, layer: nn.Module, norm: nn.Module | None, model: nn.Module) -> None:
    """Give the layer of the cut copy, and the norm behind it, what the dense model's now hold."""
    _weight(layer).copy_(_weight(reader.layer)[reader.outputs[:, None], reader.inputs])
    constant = _constant_of(model, reader)
    if constant is not None:
        there = norm.running_mean if reader.layer.bias is None and norm is not None else layer.bias
        there.data.copy_(constant[reader.outputs])  # type: ignore[union-attr]


def _tensors(model: nn.Module, reader: Reader) -> list[Tensor]:
    """Return the tensors that a fit changes."""
    constant = _constant_of(model, reader)
    return [reader.layer.weight.data, *([] if constant is None else [constant])]  # type: ignore[list-item]


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    """Give a list for hooks, and take them off at the end."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
