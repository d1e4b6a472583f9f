"""Computes or measures FLOPs, bytes and parameters of a training step."""
