"""Concepts of the classes of a dataset, found in its images by a trained classifier."""
