"""What a model is worth on held-out rows: losses, rankings, answers, graded, with a tool or without."""
