"""Publishes a model to the Hub: a gate of checks, then one reviewed commit."""
