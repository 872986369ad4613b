"""Pure tensor maths of quantizing one linear: the grid, the scale search, rounding with error feedback."""
