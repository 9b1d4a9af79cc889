"""Exchange signals, tokens and the coreset between ranks with tensor collectives."""
