"""One command, ten minutes on a GPU: correctness, training and serving of an 8B shape, with JSON back."""
