"""What makes tokens fewer, in the words of a card."""

from collections.abc import Mapping
from typing import Any

METHODS = {
    "class_attention": "the patch tokens that the class token reads least are dropped",
    "diffrate": "the tokens that the class token reads least are dropped and the next are merged into their nearest "
    "(DiffRate, Chen et al., ICCV 2023, arXiv 2305.17997)",
    "dynamicvit": "learned predictors decide, image by image, which patch tokens go on (DynamicViT, Rao et al., "
    "NeurIPS 2021, arXiv 2106.02034)",
    "evit": "the patch tokens that the class token reads least are fused into one (EViT, Liang et al., ICLR 2022, "
    "arXiv 2202.07800)",
    "pitome": "tokens that resemble many others are merged (PiToMe, Tran et al., NeurIPS 2024, arXiv 2405.16148)",
    "random": "patch tokens are dropped at random",
    "spvit": "small learned selectors decide, image by image, which patch tokens go on, and a package token condenses "
    "the others (SPViT, Kong et al., ECCV 2022, arXiv 2112.13890)",
    "tome": "the most similar pairs of tokens are merged (ToMe, Bolya et al., ICLR 2023, arXiv 2210.09461)",
}


def tokens_in(manifest: Any) -> Mapping[str, Any] | None:
    """Return the settings of the reducers in a manifest, if it has some that a card has words for."""
    tokens = manifest.get("tokens") if isinstance(manifest, Mapping) else None
    return tokens if isinstance(tokens, Mapping) and tokens.get("method", "spvit") in METHODS else None


def sentence(tokens: Mapping[str, Any]) -> str:
    """Say where tokens become fewer, how, and by how much."""
    blocks, shares = (
        [str(block) for block in tokens["before_blocks"]],
        [f"{ratio:.0%}" for ratio in tokens["keep_ratios"]],
    )
    return (
        f"Before {'block' if len(blocks) == 1 else 'blocks'} {', '.join(blocks)} (counted from 0) "
        f"{METHODS[tokens.get('method', 'spvit')]}; {', '.join(shares)} of the patches are meant to be alive after that"
    )
