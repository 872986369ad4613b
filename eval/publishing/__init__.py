"""Cards of quantized models, marks of broken ones, uploads to the Hub."""
