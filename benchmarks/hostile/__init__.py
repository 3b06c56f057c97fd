"""A hostile client beside running streams: `python -m benchmarks.hostile`."""
