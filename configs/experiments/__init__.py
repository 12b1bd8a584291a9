"""The shipped experiments: `tokensift experiment NAME` finds them by name, from any folder."""
