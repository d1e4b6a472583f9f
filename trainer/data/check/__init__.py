"""The pass over all data before training."""
