"""SynFlow: what carries the least of the flow through the weights goes first, without any data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hf_prune.analyse.graph import AxisGraph, AxisInfo
from hf_prune.analyse.inputs import inputs_for
from hf_prune.analyse.running import output_tensors, quiet_run
from hf_prune.errors import CriterionError
from hf_prune.score.base import finished
from hf_prune.score.iterative import in_steps, require_schedule
from hf_prune.score.linear_flow import LinearFlow
from hf_prune.score.parts import Parts, Units, Values
from hf_prune.score.saliency import Probe, Saliency, gradients_at, warn_of_silence


@dataclass(frozen=True, kw_only=True)
class Synflow(Saliency):
    """Share of the flow through the network that runs through a part, while the network becomes less.

    With absolute values for all weights, an image of ones flows through the network. `R` is the sum of its outputs, and
    `w dR/dw`, summed over the weights that read a unit, is what of `R` runs through it. In a chain every layer carries
    all of `R`: what is left of a layer carries the more the less it is, so that none is emptied, provided that parts go
    step by step. See `in_steps` for how scores come out of the steps; they suit every budget that leaves more than
    `keep_ratio` of the units.

    That holds for networks of layers without biases and ReLU. Others are run as if they were linear, see `linear_flow`:
    biases and the shifts of norms count as zero, norms do not centre, batch norms divide by their running deviation,
    softmax and activations keep their value and pass flow on in proportion, and attention shares it between values,
    keys and queries. Position embeddings and class tokens feed the network besides the image. All of it is computed in
    double precision, on copies: flows through deep networks are large numbers.

    Source: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, NeurIPS
    2020. Differs from it by biases (there absolute values) and by what is said of layers that are not linear.

    Attributes:
        steps: Number of steps; 1 scores the whole network once, by shares of the flow.
        keep_ratio: Share of the units that is left at the end.

    Raises:
        CriterionError: If there is no step, or nothing to keep.
    """

    name = "synflow"
    needs = "none"
    comparable = True

    steps: int = 100
    keep_ratio: float = 0.05

    def __post_init__(self) -> None:
        require_schedule(self.name, self.steps, self.keep_ratio)

    def score(
        self, model: nn.Module, graph: AxisGraph, axes: Sequence[AxisInfo], data: Iterable[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return how long units stay, from 0 to 1; see `Criterion.score`.

        One backward run of one image a step, in double precision, and some four copies of the weights in it. What the
        scores of an axis are hangs on the axes that it is scored with, for units of all of them go.

        Raises:
            CriterionError: If the flow is zero or too large for a number.
        """
        return finished(self, self.rate(model, Units(graph, axes, self.keep_ratio), data))

    def rate(self, model: nn.Module, parts: Parts, data: Iterable[Any] | None) -> Values:
        """See `Saliency.rate`."""
        inputs = inputs_for(model) if parts.inputs is None else parts.inputs
        with quiet_run(model), torch.enable_grad():
            probe = Probe(model, Tensor.double)
            for name, parameter in model.named_parameters():
                is_shift = name.endswith("bias") and parameter.ndim == 1
                probe.weights[name] = probe.weights[name].abs() * (not is_shift)

            def shares(masks: Mapping[str, Tensor]) -> Values:
                found = parts.sums(flow_shares(probe, parts.names(), inputs, masks))
                if not masks:
                    warn_of_silence(self, found)
                return {name: sums.abs() for name, sums in found.items()}

            return shares({}) if self.steps == 1 else in_steps(shares, parts, self.steps)


def flow_shares(probe: Probe, names: Sequence[str], inputs: Any, masks: Mapping[str, Tensor]) -> Values:
    """Return `w dR/dw / R` of every weight by parameter name, `R` being the sum of the outputs for an image of ones.

    Args:
        probe: With weights that are not negative.
        names: Parameters.
        inputs: Example inputs, of which the shape counts.
        masks: Parameter name -> factors, zero where something went.

    Raises:
        CriterionError: If `R` is zero or too large for a number.
    """
    leaves = probe.leaves(names, masks)
    device = next(iter(probe.weights.values())).device

    def ones(tensor: Tensor) -> Tensor:
        is_image = tensor.is_floating_point()
        return torch.ones(tensor.shape, dtype=torch.float64, device=device) if is_image else tensor.to(device)

    inputs = tree_map_only(Tensor, ones, (inputs,) if isinstance(inputs, Tensor) else inputs)
    with LinearFlow():
        outputs = [t for t in output_tensors(probe.run(leaves, inputs)) if t.is_floating_point()]
        flow = torch.stack([output.sum() for output in outputs]).sum()
    if not flow.isfinite() or not flow:
        raise CriterionError(
            f"the flow through a model must be a number other than zero for 'synflow', got {flow.item()}: nothing "
            f"comes through weights that are all zero, as of a classifier before training, and without norms very deep "
            f"models go beyond double precision; start from other weights"
        )
    gradients = gradients_at(flow, leaves)
    return {name: leaf.detach() * gradients[name] / flow.detach() for name, leaf in leaves.items()}
