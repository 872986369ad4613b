"""GGUF, the file format of llama.cpp: reading, checking and turning back into a checkpoint."""
