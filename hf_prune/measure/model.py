"""What a model costs, measured: parameters, multiply-accumulates, milliseconds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_prune.analyse.inputs import batch_of, inputs_for
from hf_prune.analyse.running import call_model
from hf_prune.measure.latency import device_name, summarize, time_side_by_side
from hf_prune.measure.report import LatencyStats
from hf_prune.measure.token_cost import count_macs


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one model costs on one device.

    Attributes:
        params: Parameters.
        macs: Multiply-accumulates of one image.
        latency: Milliseconds a batch.
        batch_size: Images a batch.
        images_per_s: Throughput at the median latency.
        device: What the device calls itself.
        dtype: Number format of the weights.
        threads: CPU threads.
        image: Shape of one image, channels first.
    """

    params: int
    macs: int
    latency: LatencyStats
    batch_size: int
    images_per_s: float
    device: str
    dtype: str
    threads: int
    image: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)


def measure(model: nn.Module, example_inputs: Any = None, *, batch_size: int = 1, repeats: int = 20) -> Measurement:
    """Measure a model where it is, in evaluation mode.

    Args:
        model: On any device.
        example_inputs: See `hf_prune.analyze`.
        batch_size: Images a batch.
        repeats: Timed batches.

    Raises:
        TraceError: If no inputs are given and the model does not say how large its images are.
    """
    return measure_together({"model": model}, example_inputs, batch_size=batch_size, repeats=repeats)["model"]


def measure_together(
    models: Mapping[str, nn.Module], example_inputs: Any = None, *, batch_size: int = 1, repeats: int = 20
) -> dict[str, Measurement]:
    """Measure models in turns, so that a slow spell of the machine falls on all of them; see `measure`."""
    first = next(iter(models.values()))
    parameter = next(first.parameters())
    one = _on(inputs_for(first) if example_inputs is None else example_inputs, parameter)
    batch = batch_of(one, batch_size)
    modes = {module: module.training for model in models.values() for module in model.modules()}
    runs = {name: (lambda _, model=model: call_model(model, batch)) for name, model in models.items()}
    try:
        for model in models.values():
            model.eval()
        macs = {name: count_macs(lambda model=model: call_model(model, one)) for name, model in models.items()}
        with torch.inference_mode():
            times = time_side_by_side(runs, parameter.device, repeats=repeats)
    finally:
        for module, training in modes.items():
            module.training = training
    return {name: _measurement(model, macs[name], times[name], batch) for name, model in models.items()}


def compare(
    dense: nn.Module, pruned: nn.Module, example_inputs: Any = None, *, batch_sizes: Sequence[int] = (1, 16)
) -> dict[str, Any]:
    """Measure a dense and a pruned model in turns; what comes out is what `hf_prune.save` keeps and a card shows.

    Raises:
        TraceError: See `measure`.
    """
    models = {"dense": dense, "pruned": pruned}
    found = {size: measure_together(models, example_inputs, batch_size=size) for size in batch_sizes}
    one = next(iter(found.values()))["pruned"]
    return {
        "device": one.device,
        "dtype": one.dtype,
        "threads": one.threads,
        "versions": f"torch {torch.__version__}",
        "batches": {str(size): {name: m.to_json() for name, m in pair.items()} for size, pair in found.items()},
    }


def _measurement(model: nn.Module, macs: int, times_ms: list[float], batch: Any) -> Measurement:
    parameter, latency = next(model.parameters()), summarize(times_ms)
    images = next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return Measurement(
        params=sum(p.numel() for p in model.parameters()),
        macs=macs,
        latency=latency,
        batch_size=len(images),
        images_per_s=1e3 * len(images) / latency.median_ms,
        device=device_name(parameter.device),
        dtype=str(parameter.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        image=tuple(images.shape[1:]),
    )


def _on(inputs: Any, parameter: Tensor) -> Any:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else tensor.dtype)

    return tree_map_only(Tensor, move, inputs)
