"""Writes the exported folder, which opens through both doors."""
