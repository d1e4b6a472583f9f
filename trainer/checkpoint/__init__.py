"""Folders that are complete or absent."""
