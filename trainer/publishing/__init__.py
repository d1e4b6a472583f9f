"""Publishing a model: a gate of checks, then one reviewed commit."""
