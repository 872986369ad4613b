"""Affine groups: their widths, how they are packed, and rounding onto them."""
