"""Finds an evaluation's images and questions among the rows of training data."""
