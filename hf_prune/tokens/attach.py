"""Token pruning inside a model that stays what it is: same class, same checkpoint keys, reducers beside them."""

from functools import partial

from torch import nn

from hf_prune.errors import UnsupportedModelError
from hf_prune.tokens.blocks import TokenBlocks
from hf_prune.tokens.config import TokenPruningConfig
from hf_prune.tokens.pruning import TokenPruning
from hf_prune.tokens.site import find_site

ATTRIBUTE = "token_pruning"


def add_token_pruning(model: nn.Module, settings: TokenPruningConfig) -> TokenPruning:
    """Put fresh reducers into a vision transformer, in place.

    The model keeps its class and every key of its checkpoint; what has parameters appears as `token_pruning.*` on
    the module that owns the blocks.

    Args:
        model: See `site.SUPPORTED`.
        settings: What to add.

    Returns:
        The new module, also reachable through `token_pruning_of(model)`.

    Raises:
        UnsupportedModelError: If the model is of another kind or already token-pruned.
        ManifestError: If a reducer would sit behind the last block, or the heads do not divide the width.
    """
    site = find_site(model)
    if hasattr(site.owner, ATTRIBUTE):
        raise UnsupportedModelError("the model must not be token-pruned yet, but it already holds selectors")
    parameter = next(site.stacks[0].blocks.parameters())
    pruning = TokenPruning(settings, site).to(parameter.device)
    pruning.train(model.training)
    site.owner.add_module(ATTRIBUTE, pruning)
    for stack in site.stacks:
        for number, block in enumerate(stack.blocks.children() if pruning.keeps_grid else ()):
            block.register_forward_hook(partial(pruning.back_on_grid, stack.first + number), prepend=True)
        setattr(stack.parent, stack.blocks_name, TokenBlocks(list(stack.blocks.children()), pruning, stack.first))
    site.norm.register_forward_hook(pruning.fill_after_norm)
    if site.pool is not None:
        site.pool.register_forward_pre_hook(pruning.mask_pool, with_kwargs=True)
    return pruning


def token_pruning_of(model: nn.Module) -> TokenPruning:
    """Return the reducers of a token-pruned model.

    Raises:
        UnsupportedModelError: If it has none.
    """
    found = [module for module in model.modules() if isinstance(module, TokenPruning)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"the model must be token-pruned (hold one set of selectors), but {type(model).__name__} holds "
            f"{len(found)}; add them with `add_token_pruning`"
        )
    return found[0]
