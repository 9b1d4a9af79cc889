"""Between ranks: exchanging signals and tokens with tensor collectives, sharing out the coreset."""
