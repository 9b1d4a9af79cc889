"""Answers to math questions: extracted from words and LaTeX, and compared."""
