"""Generated data: a mixture of six sources, and text in the Pile's format."""
