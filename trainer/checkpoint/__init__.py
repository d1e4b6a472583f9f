"""Checkpoint folders that are either complete or absent."""
