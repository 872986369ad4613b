"""GGUF bit for bit: header, names, reading, writing, verification."""
