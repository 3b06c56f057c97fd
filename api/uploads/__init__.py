"""Files and parts received by HTTP: parsed, checked and written to storage as they arrive."""
