"""The compiled path: blocks that run in C, and their weights."""
