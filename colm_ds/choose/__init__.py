"""Choose once from a whole dataset, and score it by a reference model, with the selectors of training."""
