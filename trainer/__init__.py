"""Stage 2: score shards -> checkpoints. Imports neither Ray nor `score_jobs`."""
