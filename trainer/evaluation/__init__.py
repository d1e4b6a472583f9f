"""Scorers and the TextVQA evaluator."""
