"""llama.cpp as an engine: models run in processes of their own, and bases compared with Transformers."""
