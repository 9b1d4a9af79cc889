"""Probe the model: estimate the signal of every example by `spsa`, `exact`, `sketch`, `projection` or `tokens`."""
