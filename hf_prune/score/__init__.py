"""Score the units of axes: one file a criterion, listed in `registry.py`."""
