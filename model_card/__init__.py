"""Writes the model card from a run's own record, and the licence files that go with it."""

from .card import CardError, licence_files, licence_problems, quick_snippet, render_card, usage_snippet


__all__ = ["CardError", "licence_files", "licence_problems", "quick_snippet", "render_card", "usage_snippet"]
