"""The small models and the trained exits that ship with offramp: files, and no code.

offramp finds this package by its entry point, and never imports it. `models/` has a folder for each model, by its
alias; `exits/` has one for each model that exits were trained for. Each folder holds a record of how it was made.
"""

__version__ = "0.1.0"
