"""Knows the field's data sets and weights: where they are, how large, under which licence, with which holes."""
