"""Lets transformers build a pruned model from its config: one wrapper, idle without a manifest."""

import functools
from typing import Any

from transformers import PreTrainedModel

from hf_prune.publish.manifest import KEY, Manifest
from hf_prune.tokens.attach import TokenPruning, add_token_pruning
from hf_prune.tokens.site import tokens_owner


def install() -> None:
    """Make every transformers model with a manifest in its config build itself pruned; may be called again.

    `post_init` is the last line of every model's constructor and runs before weights are loaded, so shards, dtypes and
    device maps see the pruned skeleton. A model without a manifest is not touched.
    """
    original = PreTrainedModel.post_init
    if hasattr(original, "hf_prune_original"):
        return

    @functools.wraps(original)
    def post_init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        data = getattr(self.config, KEY, None)
        # Parts of a model are models with the same config: an encoder alone has no tokens of its own to prune, and a
        # headed model contains a headless one that has been here already.
        is_whole = hasattr(tokens_owner(self), "embeddings")
        if data is not None and is_whole and not any(isinstance(module, TokenPruning) for module in self.modules()):
            add_token_pruning(self, Manifest.from_dict(data).tokens)
        return result

    post_init.hf_prune_original = original  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
