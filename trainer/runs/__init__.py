"""A recipe from start to summary."""
