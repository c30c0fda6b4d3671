"""Where a vision transformer keeps its blocks, its final norm and its prefix tokens: read from the model."""

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hf_prune.errors import UnsupportedModelError

SUPPORTED = (
    "ViT, DeiT (plain and distilled), DINOv2 (with and without registers) and SigLIP image classifiers and DINOv2 "
    "backbones of transformers, and timm's VisionTransformer, Eva and PiT families (ViT, DeiT, DeiT-III, DINOv2, "
    "SigLIP, EVA, PiT)"
)
MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers", "siglip", "siglip_vision_model")
# Plain stacks of blocks, older and newer layouts of the same model; the first that exists is taken.
BLOCK_PATHS = ("layers", "encoder.layer", "encoder.layers")
PREFIX_PARAMETERS = ("cls_token", "distillation_token", "register_tokens")


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other on one grid of tokens.

    Attributes:
        parent: Module that holds the blocks.
        blocks_name: Attribute of `parent` that is the container of blocks.
        first: Number of its first block, counted over all stacks of the model.
        dim: Token width.
    """

    parent: nn.Module
    blocks_name: str
    first: int
    dim: int

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The container of blocks."""
        return getattr(self.parent, self.blocks_name)


@dataclass(frozen=True, kw_only=True)
class TokenSite:
    """The places in one model that token pruning needs.

    Attributes:
        library: Which library the model is from.
        owner: Module that the selectors are registered on.
        stacks: Where blocks are: one stack, or one for each grid of a hierarchical model.
        norm: Norm after the last block.
        pool: Attention pooling that must be told which tokens are hidden, if there is one.
        token_reader: Module behind the norm that reads every token, so that its cost depends on their number.
        mask_argument: Name under which a block takes an additive attention mask.
        num_prefix_tokens: Class, distillation and register tokens in front of the patches.
        pool_with_prefix: Whether mean pooling averages the prefix tokens too.
        num_heads: Attention heads of a block.
        fused_attention: Whether blocks call torch's fused attention.
        needs_grid: Whether what follows the blocks reads a full grid of tokens, so that it must be put together again.
    """

    library: Literal["transformers", "timm"]
    owner: nn.Module
    stacks: tuple[Stack, ...]
    norm: nn.Module
    pool: nn.Module | None
    token_reader: nn.Module | None
    mask_argument: str
    num_prefix_tokens: int
    pool_with_prefix: bool
    num_heads: int
    fused_attention: bool
    needs_grid: bool = False

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The container of blocks.

        Raises:
            UnsupportedModelError: If there are several.
        """
        first, *others = self.stacks
        if others:
            raise UnsupportedModelError(
                f"the cost of tokens is known for models with one grid of tokens, and {type(self.owner).__name__} has "
                f"{len(self.stacks)}: give `keep_ratios` instead of a target, and time the model as a whole"
            )
        return first.blocks

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.stacks[-1].first + len(self.stacks[-1].blocks)

    def stack_of(self, block: int) -> Stack:
        """Return the stack that a block is in."""
        return next(stack for stack in reversed(self.stacks) if stack.first <= block)


def find_site(model: nn.Module) -> TokenSite:
    """Find where tokens can be dropped in a plain vision transformer.

    Raises:
        UnsupportedModelError: If the model is of another kind, with the list of supported ones.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) in MODEL_TYPES:
        return _transformers_site(model, config)
    if {"VisionTransformer", "Eva"} & {kind.__name__ for kind in type(model).__mro__}:
        return _timm_site(model)
    if "PoolingVisionTransformer" in {kind.__name__ for kind in type(model).__mro__}:
        return _pit_site(model)
    kind = getattr(config, "model_type", None) or type(model).__name__
    raise UnsupportedModelError(
        f"token pruning needs a plain vision transformer, got '{kind}' ({type(model).__name__}); "
        f"supported are {SUPPORTED}; Swin takes `hf_prune.add_two_speed` instead"
    )


def tokens_owner(model: nn.Module) -> nn.Module:
    """Return the part of a transformers model that makes tokens and runs the blocks on them."""
    return getattr(model, "vision_model", None) or getattr(model, "base_model", model)


def _transformers_site(model: nn.Module, config: Any) -> TokenSite:
    vision = getattr(config, "vision_config", config)
    owner = tokens_owner(model)
    path = next((path for path in BLOCK_PATHS if _resolve(owner, path) is not None), None)
    norm = getattr(owner, "layernorm", None) or getattr(owner, "post_layernorm", None)
    if path is None or norm is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not hold its blocks under one of {BLOCK_PATHS}; this release of "
            f"transformers lays the model out in a way that is not known here"
        )
    implementation = getattr(vision, "_attn_implementation", "sdpa")
    if implementation not in ("sdpa", "eager", None):
        raise UnsupportedModelError(
            f"token pruning passes an additive attention mask, which '{implementation}' attention does not take; "
            f'load the model with attn_implementation="sdpa"'
        )
    parent_path, _, name = path.rpartition(".")
    embeddings: nn.Module = owner.embeddings  # type: ignore[assignment]
    parameters = dict(embeddings.named_parameters(recurse=False))
    return TokenSite(
        library="transformers",
        owner=owner,
        stacks=(Stack(owner.get_submodule(parent_path), name, 0, vision.hidden_size),),
        norm=norm,
        pool=None,
        # Class-token poolers read one token; SigLIP's attention head runs on all, though its classifier ignores it.
        token_reader=getattr(owner, "head", None),
        mask_argument=_mask_argument(owner.get_submodule(path)),
        num_prefix_tokens=sum(parameters[name].shape[1] for name in PREFIX_PARAMETERS if name in parameters),
        pool_with_prefix=False,
        num_heads=vision.num_attention_heads,
        fused_attention=implementation != "eager",
        needs_grid=hasattr(model, "out_features"),
    )


def _timm_site(model: Any) -> TokenSite:
    pool = getattr(model, "attn_pool", None)
    if pool is not None and (
        getattr(pool, "pos_embed", None) is not None or "attn_mask" not in inspect.signature(pool.forward).parameters
    ):
        raise UnsupportedModelError(
            f"the attention pooling of this {type(model).__name__} ({type(pool).__name__}) cannot leave tokens "
            f"out: it must take an `attn_mask` and have no position embedding of its own"
        )
    attention = model.blocks[0].attn
    return TokenSite(
        library="timm",
        owner=model,
        stacks=(Stack(model, "blocks", 0, model.embed_dim),),
        norm=model.norm,
        pool=pool,
        token_reader=pool,
        mask_argument=_mask_argument(model.blocks),
        num_prefix_tokens=model.num_prefix_tokens,
        pool_with_prefix=bool(getattr(model, "pool_include_prefix", False)),
        num_heads=attention.num_heads,
        fused_attention=bool(attention.fused_attn),
    )


def _pit_site(model: Any) -> TokenSite:
    stacks, first = [], 0
    for stage in model.transformers:
        stacks.append(Stack(stage, "blocks", first, stage.blocks[0].norm1.normalized_shape[0]))
        first += len(stage.blocks)
    attention = model.transformers[0].blocks[0].attn
    return TokenSite(
        library="timm",
        owner=model,
        stacks=tuple(stacks),
        norm=model.norm,
        pool=None,
        token_reader=None,
        mask_argument=_mask_argument(model.transformers[0].blocks),
        num_prefix_tokens=model.num_tokens,
        pool_with_prefix=False,
        # One number for all stages must divide each width, and the first stage has fewest heads.
        num_heads=attention.num_heads,
        fused_attention=bool(attention.fused_attn),
        needs_grid=True,
    )


def _mask_argument(blocks: Any) -> str:
    parameters = inspect.signature(blocks[0].forward).parameters
    for name in ("attention_mask", "attn_mask"):
        if name in parameters:
            return name
    raise UnsupportedModelError(
        f"the blocks of the model ({type(blocks[0]).__name__}) must take an attention mask to leave tokens out; "
        f"this one takes {list(parameters)}. Newer releases of transformers and timm have it: upgrade"
    )


def _resolve(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def logits_of(output: Any) -> torch.Tensor:
    """Return the class logits `(B, classes)` of a transformers output, a tuple or a tensor."""
    logits = getattr(output, "logits", output)
    return logits[0] if isinstance(logits, tuple) else logits
