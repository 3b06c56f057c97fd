"""The shapes that weights in tiles are read in (gemm/tiled_gemm.py)."""

# Outputs of a panel, and inputs of a tile: a weight's inputs must be a multiple of these.
PANEL_OUTPUTS, TILE_INPUTS = 64, 32
# Rows of a tile. Rows that are multiplied together by pairs: their sums for two tiles of 16 outputs, and the
# weights of these, must find room in 32 registers.
TILE_ROWS, MOST_ROWS = 16, 8
