"""Few-shot suites: the paper's tables by EleutherAI's lm-eval, on any model or on a run's checkpoints as they appear."""
