"""Metrics of benchmarks as pure functions of the standard library, each under the names of its published protocols."""
