"""Measurements of speed, memory and baselines; run them from the top folder as python -m benchmarks.NAME."""
