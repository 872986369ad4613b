"""Files: atomic writing, safetensors, JSON schemas, digests, paths, resume artifacts."""
