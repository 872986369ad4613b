"""Language models as Transformers has them in memory, and reading them from what checkpoints store."""
