"""Checkpoints that are whole or absent, and the weights that training leaves."""
