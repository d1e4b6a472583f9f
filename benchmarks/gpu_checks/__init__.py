"""The checks of `gpu_check.py`, by what they look at."""
