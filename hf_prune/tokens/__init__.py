"""Token pruning for plain vision transformers."""
