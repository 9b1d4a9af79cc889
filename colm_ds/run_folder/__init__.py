"""What lies in a run's output folder."""
