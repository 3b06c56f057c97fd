"""What a run writes: checkpoints, the artifact and resume state."""
