"""FLOPs, bytes and parameters of a training step, computed or measured."""
