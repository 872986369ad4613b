"""EXL2 plans: bits of every row group of every linear."""
