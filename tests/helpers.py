"""What tests share that is no fixture."""

import json
import socket
from pathlib import Path

from schemas.seal import seal

# After which what did not happen hangs, on a machine however busy: nothing waits so long but a test that fails.
PATIENCE_SECONDS = 600


def edit_sealed(path: Path, **changes: object) -> None:
    """Change fields of a sealed JSON file and seal it anew: what a careful forger would do, not what damage does."""
    content = json.loads(path.read_text()) | changes
    content.pop("hash", None)
    path.write_bytes(seal(content))


def free_port() -> int:
    """A port of the loopback interface that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
