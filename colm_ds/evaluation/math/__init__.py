"""Extract answers to math questions from words and LaTeX, and compare them."""
