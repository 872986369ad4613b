"""Numbers that compare a quantized model with its original."""
