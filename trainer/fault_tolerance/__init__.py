"""Handles signals, hangs, lost ranks, bad steps and out-of-memory errors."""
