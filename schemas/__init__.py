"""What the two stages agree on: the config, the contract on disk, the definition of a per-token loss."""
