"""What the model tells us: calibration text, streaming passes, statistics, error curves."""
