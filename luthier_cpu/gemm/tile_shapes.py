"""How weights in tiles are stored and read (gemm/bf16_gemv.py, gemm/bf16_gemm.py).

A weight [O, K] is stored in panels of 64 outputs, [O/64, K/32, 4, 16, 16, 2]: of a panel and 32 inputs four
tiles of 16 outputs, of a tile 16 pairs of inputs, of a pair 16 outputs. So it is read from beginning to end,
a line of 16 outputs at a time.
"""

# Outputs of a panel, and inputs of a tile: a weight's inputs must be a multiple of these.
PANEL_OUTPUTS, TILE_INPUTS = 64, 32
# Rows of a tile. Rows that are multiplied together by pairs: their sums for two tiles of 16 outputs, and the
# weights of these, must find room in 32 registers.
TILE_ROWS, MOST_ROWS = 16, 8
