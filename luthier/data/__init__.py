"""Text only: formats, rendering, tokens, checks and splits. Never torch."""
