"""Export a run as a model or adapter for other tools, with a model card."""
