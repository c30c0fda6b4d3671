"""Training after (or during) pruning: the accelerate loop and distillation."""
