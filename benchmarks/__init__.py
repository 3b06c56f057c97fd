"""Measurements beside peers: a speed is a ratio of runs that alternate on one machine."""
