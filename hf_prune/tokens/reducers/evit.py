"""EViT: keep what the class token reads most, fuse the rest."""

from typing import ClassVar

from hf_prune.tokens.config import Packages
from hf_prune.tokens.reducers.class_attention import ClassAttention


class Evit(ClassAttention):
    """Keeps the tokens with most class attention and fuses the others into one, weighted by that attention.

    Source: Liang et al., Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations
    (EViT), ICLR 2022, arXiv 2202.07800. Differs from it in this: tokens leave before the next block as a whole, where
    the paper takes them out between attention and MLP of one block; and the fused token is a normalised mean.
    """

    packages: ClassVar[Packages] = "single"
