"""Find the axes of a model: what can be pruned, what is tied to it, and what it costs."""
