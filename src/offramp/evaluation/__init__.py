"""Tasks, scores, timing and reports."""
