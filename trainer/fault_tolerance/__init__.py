"""Signals, hangs, lost ranks, bad steps, lack of memory."""
