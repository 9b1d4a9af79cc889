"""Before a run: memory and time that a job will need, and what would change them."""
