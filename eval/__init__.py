"""What it cost: perplexity, KL divergence, agreement, reports."""
