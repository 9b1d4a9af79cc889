"""Large batches: which examples a step looks at, who holds them, and how they are cut into micro-batches."""
