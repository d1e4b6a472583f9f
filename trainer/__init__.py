"""Stages, data, training, evaluation and publishing."""
