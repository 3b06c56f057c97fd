"""What is trained: the model with its method, its batches, losses and optimizer."""
