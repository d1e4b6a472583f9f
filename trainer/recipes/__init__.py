"""Shipped recipes, found by name."""
