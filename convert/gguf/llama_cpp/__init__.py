"""What is taken from llama.cpp and made for it: converter, mixtures, importance matrices."""
