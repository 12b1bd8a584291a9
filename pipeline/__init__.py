"""The command line and everything around the two stages."""
