"""GGUF, the file format of llama.cpp: ggml's types and kernels, reading, writing, turning back into a checkpoint."""
