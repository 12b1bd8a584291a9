"""What a failed command says: one message, never a traceback. The one place where errors become words."""

import errno
import os
import sys
import tempfile
import traceback

from rich.console import Console
from rich.text import Text

from schemas import disk
from schemas.errors import UserError, first_line, printable

USER, UNFORESEEN, INTERRUPTED = 2, 1, 130
FIXES = {
    **disk.FIXES,
    # These may be of reading too.
    errno.EACCES: "mend its permissions, or choose another path",
    errno.EPERM: "mend its permissions, or choose another path",
    errno.ENOENT: "mend the path",
    errno.ENOTDIR: "mend the path: a part of it is a file",
    errno.EISDIR: "mend the path: it is a folder",
    errno.EEXIST: "it is not the folder it must be; move it, or choose another path",
    errno.ENAMETOOLONG: "shorten the path",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def explain(error: BaseException) -> int:
    """Print what went wrong on standard error; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        _print("stopped", "what is finished stays: the same command goes on from there", status=INTERRUPTED)
        return INTERRUPTED
    if (known := as_user_error(error)) is not None:
        _print("error", str(known), status=USER)
        return USER
    handle, log = tempfile.mkstemp(prefix="tokensift-", suffix=".log")
    with os.fdopen(handle, "w") as file:
        traceback.print_exception(error, file=file)
    _print("error", f"{type(error).__name__}: {first_line(error)}; not foreseen, please report it with {log}")
    return UNFORESEEN


def as_user_error(error: BaseException) -> UserError | None:
    """What the outside did to us, in words: disk, permissions, memory. None for what nobody foresaw."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in FIXES:
        where = f"{error.filename}: " if error.filename else ""
        return UserError(f"{where}{os.strerror(error.errno)}", FIXES[error.errno])
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return UserError(
            f"out of memory ({first_line(error)})", "lower train.micro_rows, score.batch_tokens or context.window"
        )
    return None


def _print(kind: str, message: str, status: int = UNFORESEEN) -> None:
    style = "bold yellow" if status == INTERRUPTED else "bold red"
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    console.print(Text.assemble((f"{kind}:", style), f" {printable(message)}"))
