"""Originals on disk: files, what kind of model they hold, and reading them."""
