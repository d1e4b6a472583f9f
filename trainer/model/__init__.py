"""A stage's model: its parts, adapters and origin."""
