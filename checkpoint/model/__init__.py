"""Kinds of model: their config, families and tensor names."""
