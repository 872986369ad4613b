"""Drawings of a report."""
