"""Texts by domain, which of their tokens count, and the damage on them."""
