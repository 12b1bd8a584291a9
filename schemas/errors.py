"""The one exception for what the user can mend: the command line prints it without a traceback."""


class UserError(Exception):
    """A mistake in input, config or environment: the problem names the file and the field, the fix says the way on."""

    def __init__(self, problem: str, fix: str = ""):
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix

    def __str__(self) -> str:
        return f"{self.problem}; {self.fix}" if self.fix else self.problem


class Stranded(UserError):
    """A UserError that leaves threads of a foreign library blocked for good: the process must be ended, not unwound."""


class Unreachable(UserError):
    """A UserError that may pass: a store or the way to it fails. Another process on another node may get through."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """`text` without what could drive a terminal or break XML; newlines and tabs stay."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
