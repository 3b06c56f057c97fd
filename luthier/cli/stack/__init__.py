"""The embedded default behind `luthier up`: starting, supervising and stopping every process of one home."""
