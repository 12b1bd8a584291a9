"""What a full, read-only or forbidden disk raises: no attempt mends it, so it is the user's to know at once."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from schemas.errors import UserError
from schemas.place import Place

FREE_SPACE = "free some space and run again; what is finished stays"
MAKE_WRITABLE = "make it writable for this user, or give another output; what is finished stays"
FIXES = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: FREE_SPACE,  # the largest file that this disk or `ulimit -f` allows
    errno.EROFS: MAKE_WRITABLE,
    errno.EACCES: MAKE_WRITABLE,
    errno.EPERM: MAKE_WRITABLE,
}


@contextmanager
def writing(path: Place) -> Iterator[None]:
    """Raise UserError for what the disk under `path` will refuse again; other errors pass, for they may be transient."""
    try:
        yield
    except OSError as error:
        if error.errno not in FIXES:
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror})", FIXES[error.errno]) from error
