"""Which process holds which part of a parameter."""
