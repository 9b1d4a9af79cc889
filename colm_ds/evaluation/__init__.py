"""Evaluate models: held-out loss, multiple choice, math, SQuAD, perplexity and exact match."""
