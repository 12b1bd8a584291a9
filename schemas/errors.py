"""The one exception for what the user can mend: the command line prints it without a traceback."""


class UserError(Exception):
    """A mistake in input, config or environment; the message names the file, the field and the fix."""
