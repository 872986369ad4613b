"""Plans of all sizes before anything is quantized, and their page."""
