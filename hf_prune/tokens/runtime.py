"""How dropped tokens are treated: masked, removed and padded, removed and packed, or by counts that are fixed.

| runtime | decisions | dropped tokens | batch |
| --- | --- | --- | --- |
| masked | the method's own | stay, nobody reads them | shapes never change |
| gathered | the method's own | leave | padded to its fullest image |
| packed | the method's own | leave | one sequence, no padding |
| topk | as many in every image | leave | no padding, shapes known beforehand |

Where decisions are equal, logits are equal.
"""

from typing import Literal

import torch
from torch import Tensor

from hf_prune.errors import UnsupportedModelError
from hf_prune.tokens.packing import Packing
from hf_prune.tokens.reducers.base import Reducer

Runtime = Literal["auto", "masked", "gathered", "packed", "topk"]


def has_fixed_counts(reducer: Reducer, runtime: Runtime, *, training: bool) -> bool:
    """Return whether every image keeps as many tokens, so that shapes are known beforehand."""
    if runtime == "topk" or not reducer.learned:
        return True
    return not training and not reducer.adaptive


def removes(reducer: Reducer, runtime: Runtime, *, training: bool, while_training: bool) -> bool:
    """Return whether dropped tokens leave the sequence.

    Args:
        reducer: What drops them.
        runtime: `"auto"` removes, but masks while decisions are being learned, unless told otherwise.
        training: Whether the model is in training mode.
        while_training: Whether they leave even then.
    """
    if runtime == "auto":
        return not (training and reducer.learned) or while_training
    return runtime != "masked"


def packs(policy: Tensor, dim: int, runtime: Runtime, *, fused_attention: bool) -> bool:
    """Return whether a batch of images with unequal numbers of tokens `(B, T)` travels as one sequence.

    By itself only where padding costs more than packing does; see `Packing.is_worth_it`.
    """
    return runtime == "packed" or (runtime == "auto" and fused_attention and Packing.is_worth_it(policy, dim))


def require_exportable(reducer: Reducer, runtime: Runtime, *, fixed: bool) -> None:
    """Check that an export can follow.

    Raises:
        UnsupportedModelError: If shapes would depend on the image.
    """
    if torch.compiler.is_exporting() and not fixed and runtime != "masked":
        raise UnsupportedModelError(
            f"an exported model needs shapes that do not depend on the image, but {type(reducer).__name__} keeps "
            f'another number of tokens in each; set `token_pruning_of(model).runtime = "topk"` (as many in every '
            f'image, faster) or "masked" (its own decisions, as slow as the dense model) before the export'
        )
