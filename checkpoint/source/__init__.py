"""Reading an original: download, tensors by name, adapters, float8, positions."""
