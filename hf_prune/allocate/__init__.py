"""Share a budget out among axes."""
