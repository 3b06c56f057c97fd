"""Drop-in folder: one way to tune a model per file. Files that begin with `_`, and base.py, are skipped."""
