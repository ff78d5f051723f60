"""SmolLM2 without attention, smollm2-mamba, and its trained exits: files, and no code.

offramp finds this package by its entry point, and never imports it. `models/` holds the Mamba-2 mixers, and `exits/` the
exits, each with a record of how they were made.
"""

__version__ = "0.1.0"
