"""Measurements of speed, memory and baselines; run them from the repository root as python -m benchmarks.NAME."""
