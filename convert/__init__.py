"""Formats: all that is special to each, behind one protocol."""
