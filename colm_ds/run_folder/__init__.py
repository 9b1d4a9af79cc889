"""The files of a run's output folder: their names, reading and writing them, and what they record."""
