"""One rule an operation: how the dimensions of its inputs become those of its outputs.

A rule is given a `Call` and returns the expressions of the output's dimensions, or a list of those where there are
several outputs. Element-wise operations need no rule of their own (torch marks them), and an operation without a rule
fixes every axis that it touches.
"""

from hf_prune.analyse.rules import images, norms, parts, products, shapes
from hf_prune.analyse.rules.base import RULES, Dims, elementwise, give_up, new_dims, out_dims

__all__ = [
    "RULES", "Dims", "elementwise", "give_up", "images", "new_dims", "norms", "out_dims", "parts", "products", "shapes",
]  # fmt: skip
