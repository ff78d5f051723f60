"""A causal language model cut into blocks."""
