"""Large batches: the examples of a step, their assignment to ranks, and their micro-batches."""
