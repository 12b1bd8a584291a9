"""The shipped configs: `tokensift VERB -c demo` finds them by name, from any folder."""
