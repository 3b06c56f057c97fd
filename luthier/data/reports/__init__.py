"""Reports on the rows of a file: faults, repeats, near-duplicates, tokens."""
