"""Plan a job before it runs: its memory and time, and changes that would reduce them."""
