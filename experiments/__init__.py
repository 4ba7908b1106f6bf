"""Sweeps: grids of runs on this machine or a cluster, and their scores, figures and tables."""
