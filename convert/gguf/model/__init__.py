"""GGUF files read back as the models that they decode to."""
