"""Plans: what a file holds, what each type costs, and which type every tensor gets."""
