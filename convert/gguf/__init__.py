"""The GGUF format of llama.cpp: ggml's tensor types, files, and importance matrices."""
