"""How alike the units of an axis are, over all layers on it."""

import torch
from torch import Tensor, nn

from hf_prune.analyse.graph import AxisInfo
from hf_prune.score.base import layer_rows, relative

# Scale and shift of a norm: a carrier with more numbers a unit than these is a table, not a scale.
SCALE_AND_SHIFT = 2


def unit_gram(model: nn.Module, axis: AxisInfo) -> Tensor:
    """Return the inner products `(size, size)` of the units of an axis, each seen as one vector.

    The vector of a unit is its rows of all writers, readers and tables one behind the other, each layer divided by
    the mean norm of its rows. The whole is scaled by the mean relative norm of its scales (norms, layer scales), for
    that is what they do to a unit: as entries of the vector they would be near 1 for every unit, and a dead unit, at
    0, the farthest of all. On an axis of one layer this is the inner product of filters, up to one common factor.

    Memory: `size * size`, and one layer at a time. In float32: the error of a distance is about a thousandth of a norm.
    """
    gram, scales = torch.zeros(axis.size, axis.size), []
    for role in (axis.writers, axis.readers, axis.carriers):
        for rows in layer_rows(model, role, axis.size):
            norms = rows.norm(dim=1)
            if role is axis.carriers and rows.shape[1] <= SCALE_AND_SHIFT:
                # Scales that are zero throughout (so training starts) tell no unit from another.
                scales.extend([relative(norms).cpu()] if norms.any() else [])
            else:
                rows = rows / norms.mean().clamp_min(torch.finfo(rows.dtype).tiny)
                gram = gram.to(rows.device) + rows @ rows.T
    scale = torch.stack(scales).mean(0).to(gram.device) if scales else torch.ones(axis.size, device=gram.device)
    return gram * scale[:, None] * scale[None, :]
