"""Installed packages: of this Python, or of another one that workers run in (`score.python`)."""

import json
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from schemas.errors import UserError, first_line

ASK = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""
ASK_SECONDS = 120.0


def installed(packages: Iterable[str], python: Path | None = None) -> dict[str, str]:
    """Versions of those packages that are installed, for this Python or for `python`. Raises UserError if it cannot run."""
    if python is None:
        return {name: found for name in packages if (found := _version(name))}
    try:
        done = subprocess.run([str(python), "-c", ASK, *packages], capture_output=True, timeout=ASK_SECONDS, check=True)
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise UserError(
            f"score.python: {python} cannot be run ({first_line(error)})",
            "name the Python of an environment; `make vllm` builds .venv-vllm/bin/python",
        ) from error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
