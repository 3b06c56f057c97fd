"""torch: loading and converting a base. Shared by training and inference."""
