"""What cards say about methods that make tokens fewer: a name, a sentence or two, where we differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenMethod:
    """The words of a card on one method.

    Attributes:
        name: How a reader knows it.
        paper: Where it comes from; empty for baselines that no paper claims.
        text: What it does, following the name.
        differs: Where this implementation differs from the paper's; empty if it does not.
        bibtex: How to cite it.
    """

    name: str
    paper: str
    text: str
    differs: str = ""
    bibtex: str = ""


METHODS = {
    "spvit": TokenMethod(
        "SPViT",
        "Kong et al., ECCV 2022",
        "puts small learned selectors before some transformer blocks. Each one decides, image by image, which patch "
        "tokens go on; the ones that are dropped are condensed into a package token that stays in the sequence.",
        "at inference the decision is deterministic and the dropped tokens are really removed, where the released "
        "evaluation draws Gumbel samples and masks; the package token is a normalised weighted average and not a plain "
        "sum; and a Lagrangian drives the keep ratios to their targets in place of a fixed penalty weight.",
        """@inproceedings{kong2022spvit,
  title     = {{SPViT}: Enabling Faster Vision Transformers via Latency-Aware Soft Token Pruning},
  author    = {Kong, Zhenglun and Dong, Peiyan and Ma, Xiaolong and Meng, Xin and Niu, Wei and Sun, Mengshu and
               Shen, Xuan and Yuan, Geng and Ren, Bin and Tang, Hao and Qin, Minghai and Wang, Yanzhi},
  booktitle = {European Conference on Computer Vision (ECCV)},
  pages     = {620--640},
  year      = {2022},
  note      = {arXiv:2112.13890}
}""",
    ),
    "dynamicvit": TokenMethod(
        "DynamicViT",
        "Rao et al., NeurIPS 2021, arXiv 2106.02034",
        "puts small learned predictors before some transformer blocks, which keep the patch tokens that they score "
        "highest, as many in every image; the others are gone.",
        "dropped tokens leave the sequence in the second half of training already; and a Lagrangian drives the keep "
        "ratios to their targets in place of a fixed penalty weight.",
    ),
    "evit": TokenMethod(
        "EViT",
        "Liang et al., ICLR 2022, arXiv 2202.07800",
        "keeps the patch tokens that the class token reads most, as many in every image, and fuses the others into one "
        "token, weighted by the attention they get. It has no parameters of its own.",
        "tokens leave between two blocks and not in the middle of one; and the fused token is a normalised mean.",
    ),
    "tome": TokenMethod(
        "ToMe",
        "Bolya et al., ICLR 2023, arXiv 2210.09461",
        "merges the most similar pairs of patch tokens into their mean and lets attention count a merged token as "
        "often as it has patches. It has no parameters of its own.",
        "tokens merge between two blocks and not in the middle of one.",
    ),
    "pitome": TokenMethod(
        "PiToMe",
        "Tran et al., NeurIPS 2024, arXiv 2405.16148",
        "merges patch tokens where many are alike and leaves those in peace that are like no others. It has no "
        "parameters of its own.",
        "one margin holds for all blocks; and tokens merge between two blocks and not in the middle of one.",
    ),
    "diffrate": TokenMethod(
        "DiffRate",
        "Chen et al., ICCV 2023, arXiv 2305.17997",
        "drops the patch tokens that the class token reads least and merges the next ones into their nearest. How many "
        "of each go before every block was learned with the model's weights held fixed.",
        "candidates are shares of the tokens that a block sees; the MACs are met in every step of that learning, in "
        "place of a penalty; and tokens leave between two blocks and not in the middle of one.",
    ),
    "class_attention": TokenMethod(
        "class attention",
        "",
        "keeps the patch tokens that the class token reads most, as many in every image; the others are gone. It is "
        "the usual baseline, without parameters.",
    ),
    "random": TokenMethod(
        "random choice",
        "",
        "keeps patch tokens at the same places of every image, drawn once; the others are gone. It is the baseline "
        "that every other method must beat.",
    ),
}


def tokens_in(manifest: Any) -> Mapping[str, Any] | None:
    """Return the settings of the reducers in a manifest, if it has some that a card has words for."""
    tokens = manifest.get("tokens") if isinstance(manifest, Mapping) else None
    return tokens if isinstance(tokens, Mapping) and tokens.get("method", "spvit") in METHODS else None


def sentences(tokens: Mapping[str, Any]) -> str:
    """Say how tokens become fewer, where, and by how much."""
    method = METHODS[tokens.get("method", "spvit")]
    blocks = [str(block) for block in tokens["before_blocks"]]
    shares = [f"{ratio:.0%}" for ratio in tokens["keep_ratios"]]
    name = method.name[0].upper() + method.name[1:] + (f" ({method.paper})" if method.paper else "")
    return (
        f"{name} {method.text} Here that is before {'block' if len(blocks) == 1 else 'blocks'} {', '.join(blocks)} "
        f"(counted from 0), and {', '.join(shares)} of the patches are meant to be alive after it."
    )
