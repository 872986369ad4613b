"""What it cost: perplexity, KL divergence, agreement, reports; cards and uploads of finished models."""
