"""Serving beside peers: `make bench-serve`. One subject a file; `__main__` runs the rows."""
