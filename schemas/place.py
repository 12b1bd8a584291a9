"""Places: a path of this machine's file systems, or a URL of an object store."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, PlainValidator

from schemas.object_store import SCHEMES, ObjectStore, Url
from schemas.store import FolderStore, Store

Place = Path | Url


def is_bucket(text: str) -> bool:
    """Whether a text is a URL of an object store that we read and write ourselves."""
    return "://" in text and text.split("://", 1)[0] in SCHEMES


def to_place(text: Any) -> Place:
    """The place that a path or a URL names. Raises ValueError for a URL of another kind."""
    if isinstance(text, Path | Url):
        return text
    if not isinstance(text, str):
        raise ValueError("must be a path or a URL")
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return Url.parse(text) if "://" in text else Path(text)


def open_store(root: Place) -> Store:
    """The store that holds what lies below a place."""
    return FolderStore(root) if isinstance(root, Path) else ObjectStore(root)


def _folder(text: Any) -> Any:
    if isinstance(text, str) and "://" in text and not text.startswith("file://"):
        raise ValueError(
            f"`{text}`: must be a folder of this machine; of what is written, only `score.output` may be a URL"
        )
    return text.removeprefix("file://") if isinstance(text, str) else text


# Fields of the config: a place anywhere, and a folder of a POSIX file system.
AnyPlace = Annotated[Place, PlainValidator(to_place), PlainSerializer(str)]
Folder = Annotated[Path, BeforeValidator(_folder)]
