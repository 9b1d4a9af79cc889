"""Train from a recipe: start or resume, train, evaluate, save."""
