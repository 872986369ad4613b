"""llama-perplexity's currency: its base files read and written, its table printed, whatever runs the models."""
