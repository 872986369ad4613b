"""Whole runs: planning, the rounding pass, series, and what they report."""
