"""The models that benchmarks/coverage.py is run on, as plain data."""
