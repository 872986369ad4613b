"""Finished directories: written, read back."""
