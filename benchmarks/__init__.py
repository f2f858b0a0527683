"""Benchmarks: every ratio is paired in one run, and every result says on what machine it was measured."""
