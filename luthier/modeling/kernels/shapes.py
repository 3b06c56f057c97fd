"""The shapes that weights in tiles are read in (_tiles.py)."""

# Outputs of a panel, and inputs of a tile: a weight's inputs must be a multiple of these.
PANEL_OUTPUTS, TILE_INPUTS = 64, 32
