"""Bytes on disk: checkpoints, EXL2 directories. Knows no model and no maths."""
