"""Held-out loss per source and exact-match answers."""
