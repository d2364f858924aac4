"""Benchmarks, trace replay, simulation runs and reports."""
