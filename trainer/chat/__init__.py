"""Talks to a model: conversations about images, answered as they are generated."""
