"""Benchmarks and needles in haystacks."""
