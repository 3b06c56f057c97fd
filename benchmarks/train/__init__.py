"""Training beside other trainers: `python -m benchmarks.train`."""
