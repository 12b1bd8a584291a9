"""Side-by-side measurements: each prints a table, each is one command, none asserts a time."""
