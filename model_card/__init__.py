"""The model card, filled from a run's own record."""
