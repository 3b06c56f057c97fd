"""The catalogue of base models: what they are, where they come from, their digests. Never torch."""
