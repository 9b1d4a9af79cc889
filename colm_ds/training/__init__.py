"""A run from its recipe: start or resume, train, evaluate, save."""
