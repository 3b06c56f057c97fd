"""Jobs: their life as clients and workers see it, and what is recorded of it."""
