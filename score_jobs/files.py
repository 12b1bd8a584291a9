"""The files that a corpus is.

Formats: Parquet and JSON lines, plain, gzip or zstd (OpenWebMath's published forms). Places: local paths, globs,
object stores, any other fsspec URL, and Hugging Face datasets by name.
"""

from pathlib import Path
from typing import Any

import fsspec

from schemas.config import Corpus
from schemas.errors import UserError, first_line
from schemas.hub import split
from schemas.object_store import Url
from schemas.place import is_bucket

FORMATS = (".parquet", ".jsonl.zst", ".jsonl.gz", ".jsonl")


def resolve(corpus: Corpus) -> list[str]:
    """The corpus's shard URLs, sorted. Raises UserError for a pattern that names nothing, or no file of a known format."""
    urls = sorted({url for pattern in corpus.paths or _dataset_files(corpus) for url in _files(pattern)})
    for url in urls:
        if not is_unicode(url):  # it could be neither printed nor stored in a receipt
            raise UserError(f"corpus.paths: the file name {url!a} is not UTF-8", "rename the file")
        if not url.endswith(FORMATS):
            raise UserError(f"corpus.paths: `{url}`: unknown format", f"known are {', '.join(FORMATS)}")
    return urls


def _files(pattern: str) -> list[str]:
    """URLs of the files that a path, a glob or a URL names."""
    if is_bucket(pattern):
        try:
            return _objects(pattern)
        except UserError as error:
            raise UserError(f"corpus.paths: {error.problem}", error.fix) from error
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        if any(mark in path for mark in "*?[") and not filesystem.exists(path):
            found: dict[str, Any] = filesystem.glob(path, detail=True)
        else:
            found = {path: filesystem.info(path)}
        urls = [str(filesystem.unstrip_protocol(name)).removeprefix("file://") for name in found]
    except FileNotFoundError:
        found, urls = {}, []
    except ImportError as error:
        raise UserError(f"corpus.paths: `{pattern}` needs a package: {first_line(error)}", "pip install it") from error
    except Exception as error:  # a back end raises what its network stack raises
        raise UserError(f"corpus.paths: `{pattern}` cannot be looked up ({first_line(error)})", "mend it") from error
    folders = [name for name, info in found.items() if info.get("type") == "directory"]
    if folders:
        raise UserError(f"corpus.paths: `{folders[0]}` is a folder", f"name its files: {folders[0]}/*.jsonl.zst")
    if not urls:
        raise UserError(f"corpus.paths: `{pattern}` names no file", "mend it; it is relative to the working folder")
    return urls


def _objects(pattern: str) -> list[str]:
    """URLs of the objects that a URL or a glob of an object store names."""
    url = Url.parse(pattern)
    if url.exists():
        return [str(url)]
    found = [str(item) for item in Url(url.bucket).glob(url.key)] if any(mark in url.key for mark in "*?[") else []
    if not found and url.is_dir():
        raise UserError(f"`{url}` is a folder", f"name its files: {url}/*.jsonl.zst")
    if not found:
        raise UserError(f"`{pattern}` names no object", "mend it")
    return found


def _dataset_files(corpus: Corpus) -> list[str]:
    """The files behind a Hugging Face dataset's split, as `datasets` itself resolves them."""
    import datasets  # slow to import, and only this path needs it

    name = str(corpus.dataset)
    try:
        repository, revision = (name, None) if Path(name).exists() else split(name)
        files = datasets.load_dataset_builder(repository, revision=revision).config.data_files or {}
    except Exception as error:  # as in `_files`
        raise UserError(f"corpus.dataset: `{corpus.dataset}` cannot be resolved: {first_line(error)}") from error
    if corpus.split not in files:
        raise UserError(
            f"corpus.split: `{corpus.split}` is not in {corpus.dataset}; it has {', '.join(files) or 'none'}"
        )
    return [str(name) for name in files[corpus.split]]


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
