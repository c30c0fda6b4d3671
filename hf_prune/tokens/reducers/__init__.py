"""What makes tokens fewer between two blocks, one method a file."""
