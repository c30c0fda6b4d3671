"""Cut a model along its axes, repair what its code believes about sizes, and prove the result."""
