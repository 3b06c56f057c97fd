"""Matrix products of bfloat16: few rows, many rows, matrix tiles, blocked products of training."""
