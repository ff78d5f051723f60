"""Trained exits for Qwen2.5-Coder-0.5B-Instruct: files, and no code.

offramp finds this package by its entry point, and never imports it. `exits/` holds a folder with the exits and a record of
how they were made.
"""

__version__ = "0.1.0"
