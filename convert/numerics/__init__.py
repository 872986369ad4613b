"""Fitting factors of what is rounded to the original's predictions, end to end."""
