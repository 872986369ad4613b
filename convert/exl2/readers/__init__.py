"""EXL2 readers: the architectures, names and options that they know, and what they compute otherwise."""
