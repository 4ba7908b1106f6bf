"""Many runs: a grid of them here or on a cluster, their scores, figures and tables."""
