"""Experiments: arms, each at its own best setting, over replicates; what ran, what it cost and what came of it."""
