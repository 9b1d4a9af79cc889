"""Recipes: one YAML file per run, and the model that its sections describe."""
