"""Formats: all that is special to each, behind one protocol; and cards and uploads of finished models."""
