"""Error curves of the EXL2 grid, and rounding to it."""
