"""Builds a stage's model: parts, adapters, freezing, and options of the device."""
