"""Engines other than Transformers that run models for the evaluation."""
