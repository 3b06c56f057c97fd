"""Drop-in folder: one HTTP client per kind of inference server."""
