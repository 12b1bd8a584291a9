"""Stage 1: corpus shards -> score shards. Ray is imported only in `score_jobs.pool`."""
