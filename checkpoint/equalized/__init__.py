"""Originals with equalized channels: which pairs there are, and the view through which they are read."""
