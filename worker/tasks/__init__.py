"""The two tasks of a worker: prepare and train."""
