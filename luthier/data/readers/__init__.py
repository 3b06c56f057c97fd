"""Readers of files of rows: JSON lines, a JSON array, CSV, gzip of these, Parquet; and their checks."""
