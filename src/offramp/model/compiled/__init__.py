"""Compiled blocks: blocks that run in C, and their weights."""
