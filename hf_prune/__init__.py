"""Prune HuggingFace and timm vision models to a latency target."""
