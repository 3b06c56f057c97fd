"""Capacity: workers, memory of devices, estimates and metrics."""
