"""Read text that others wrote within bounds, and make it safe to show."""
