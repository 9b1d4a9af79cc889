"""Reading the signal: per-example gradients of the last V projection, estimated by `spsa`, `exact` or `sketch`."""
