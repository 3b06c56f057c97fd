"""Drop-in folder: one row format per file. Files that begin with `_`, and base.py, are skipped."""
