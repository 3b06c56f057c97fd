"""How rows lie in a file: JSON lines, a JSON array, CSV, gzip of these, Parquet. Bytes to one JSON object a
row, with its place; nothing here knows what a row means.
"""
