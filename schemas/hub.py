"""Names of the Hugging Face hub: `org/name`, or `org/name@revision`, where a revision is a branch, a tag or a commit."""

import re
from pathlib import Path

NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([^\s@]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
DATASET_FILE = re.compile(r"hf://datasets/([^@]+@[0-9a-f]{40})/.*")


def split(name: str) -> tuple[str, str | None]:
    """Repository and revision, None for the default branch. Raises ValueError for what is no such name."""
    found = NAME.fullmatch(name)
    if not found or name.startswith("."):
        raise ValueError(f"`{name}` is not org/name or org/name@revision")
    return found[1], found[2]


def known_as(folder: Path) -> str | None:
    """`org/name@commit` of a folder in the hub's cache (models--org--name/snapshots/commit); None of any other."""
    kind, *parts = folder.parent.parent.name.split("--")
    if folder.parent.name != "snapshots" or kind != "models" or not parts or not COMMIT.fullmatch(folder.name):
        return None
    return f"{'/'.join(parts)}@{folder.name}"


def dataset_of(url: str) -> str | None:
    """`org/name@commit` of a file of the hub's data sets; None of any other."""
    found = DATASET_FILE.fullmatch(url)
    return found[1] if found else None
