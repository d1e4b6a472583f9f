"""The one Trainer."""
