"""What a model costs and how well it does: accuracy, MACs, latency, pictures."""
