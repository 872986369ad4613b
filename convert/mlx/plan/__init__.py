"""Plans: what every scheme costs in every module, and which each gets."""
