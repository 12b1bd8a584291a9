"""Object stores: objects of a bucket under the calls that a folder's files answer to. obstore does the talking.

An object appears whole, by one PUT, or not at all; PUT-if-absent commits, and nothing is ever renamed. Uploads in parts
are not used, so a killed writer leaves nothing behind. obstore is imported with the first request alone.
"""

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from schemas.errors import Unreachable, UserError, first_line
from schemas.store import NotWritten

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
CLIENT = {"timeout": "120s", "connect_timeout": "5s"}  # of one request with its body
RETRIES = 3  # by obstore itself, in its own backoff, of each of our attempts
PATIENCE_SECONDS, FIRST_PATIENCE_SECONDS = 120.0, 5.0  # with a bucket that has answered, and one that never has
LONGEST_PAUSE_SECONDS = 5.0
# Where obstore finds credentials of S3 by itself.
AWS_GIVEN = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
AWS_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
GOOGLE_ENDPOINT = "GOOGLE_BASE_URL"
AWS_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
Answer = TypeVar("Answer")
_answered: set[str] = set()


@dataclass(frozen=True, slots=True)
class Stat:
    """What a store says of an object: its bytes, and its ETag, which changes when they do.

    mark: ETag and generation as obstore's conditional PUT wants them: S3 and Azure go by the first, GCS by the second.
    """

    st_size: int
    version: str
    mark: dict[str, str]


@dataclass(frozen=True, slots=True, order=True)
class Url:
    """An object, or all below a name: it answers the calls of a `Path` that readers need, under the same names.

    bucket: `s3://bucket`, without an end. key: what follows, without slashes around it.
    """

    bucket: str
    key: str = ""

    @classmethod
    def parse(cls, text: str) -> "Url":
        """Raises ValueError for what names no bucket."""
        scheme, _, rest = text.partition("://")
        bucket, _, key = rest.partition("/")
        if scheme not in SCHEMES or not bucket:
            raise ValueError(f"`{text}` is no URL of an object store ({', '.join(SCHEMES)})")
        return cls(f"{scheme}://{bucket}", "/".join(part for part in key.split("/") if part))

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "Url":
        return Url(self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def parent(self) -> "Url":
        """All below the name above."""
        return Url(self.bucket, self.key.rpartition("/")[0])

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return Path(self.name).stem

    def absolute(self) -> "Url":
        """Itself: it is the same on every node."""
        return self

    def stat(self) -> Stat:
        """Raises FileNotFoundError if there is no such object."""
        found = ask(self, lambda client, obstore: obstore.head(client, self.key))
        return _stat(found)

    def exists(self) -> bool:
        """Whether there is such an object."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    is_file = exists

    def is_dir(self) -> bool:
        """Whether there is any object below this name."""
        below = f"{self.key}/" if self.key else None
        return ask(self, lambda client, obstore: any(obstore.list(client, prefix=below, chunk_size=1)))

    def read_bytes(self) -> bytes:
        """The whole object. Raises FileNotFoundError if there is none."""
        return ask(self, lambda client, obstore: obstore.get(client, self.key).bytes().to_bytes())

    def read_range(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on, which the object must have."""
        return ask(
            self, lambda client, obstore: obstore.get_range(client, self.key, start=start, length=length).to_bytes()
        )

    def open(self, mode: str = "rb") -> "Reader":
        """The object as a file that is read a range a request: buffer it where reads are small."""
        assert mode == "rb"
        return Reader(self, self.stat().st_size, self.read_range)

    def glob(self, pattern: str) -> Iterator["Url"]:
        """Objects below this name that a pattern of fsspec's names, sorted; `*` does not cross a slash, `**` does."""
        return iter([url for url, _ in self.found(pattern)])

    def found(self, pattern: str) -> list[tuple["Url", Stat]]:
        """As `glob`, each with what the store says of it, by one listing: a request for 1,000 objects."""
        from fsspec.utils import glob_translate

        fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
        below = (self / fixed).key + "/" if self.key or fixed else None
        items = ask(
            self,
            lambda client, obstore: [item for chunk in obstore.list(client, prefix=below) for item in chunk],
        )
        base = f"{self.key}/" if self.key else ""
        matches = re.compile(glob_translate(pattern)).fullmatch
        named = {item["path"]: _stat(item) for item in items if matches(item["path"].removeprefix(base))}
        return [(Url(self.bucket, key), named[key]) for key in sorted(named)]


class Reader(io.RawIOBase):
    """An object as a file: `fetch(start, length)` gives the bytes of each read. Its text is the object's URL."""

    def __init__(self, url: Url, size: int, fetch: Callable[[int, int], bytes]):
        self.url, self.size, self.fetch, self.position = url, size, fetch, 0

    def __str__(self) -> str:
        return str(self.url)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As any file."""
        self.position = (0, self.position, self.size)[whence] + offset
        return self.position

    def tell(self) -> int:
        """As any file."""
        return self.position

    def readinto(self, buffer: Any) -> int:
        """One request, unless at the end."""
        length = max(0, min(len(buffer), self.size - self.position))
        if length:
            buffer[:length] = self.fetch(self.position, length)
        self.position += length
        return length


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """The objects below one name; see `schemas.store.Store`."""

    root: Url

    def path(self, name: str) -> Url:
        """Where a name lies."""
        return self.root / name

    def make(self, folder: str) -> None:
        """Nothing: a bucket has no folders."""

    def put(self, name: str, content: bytes) -> None:
        """Give `content` the name, replacing what had it. Raises NotWritten if it reads back differently."""
        url = self.path(name)
        ask(url, lambda client, obstore: obstore.put(client, url.key, content, use_multipart=False))
        if url.read_bytes() != content:
            raise NotWritten(f"{url}: reads back differently from what was written; is another job writing here?")

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """`put`, unless the name is taken; whether it holds `content` now.

        The answer to a PUT can get lost, and the name then be found taken by ourselves: what lies there decides.
        """
        from obstore.exceptions import AlreadyExistsError

        url, given = self.path(name), True
        try:
            ask(url, lambda client, obstore: obstore.put(client, url.key, content, mode="create", use_multipart=False))
        except AlreadyExistsError:
            given = False
        same = url.read_bytes() == content
        if given and not same:
            raise NotWritten(f"{url}: reads back differently from what was written; is another job writing here?")
        return same

    def put_if_unchanged(self, name: str, content: bytes, seen: Stat) -> bool:
        """`put` in place of the object as it was `seen`; false if it is another now, or none."""
        from obstore.exceptions import PreconditionError

        url, mode = self.path(name), seen.mark
        try:
            ask(url, lambda client, obstore: obstore.put(client, url.key, content, mode=mode, use_multipart=False))
        except (PreconditionError, FileNotFoundError):
            return False
        return True

    def read(self, name: str) -> bytes:
        """The bytes of a name."""
        return self.path(name).read_bytes()

    def exists(self, name: str) -> bool:
        """Whether the name is taken."""
        return self.path(name).exists()

    def delete(self, name: str) -> None:
        """Free the name, if it is taken."""
        url = self.path(name)
        with suppress(FileNotFoundError):  # S3 says nothing of it, GCS does
            ask(url, lambda client, obstore: obstore.delete(client, url.key))

    def names(self, folder: str, suffix: str) -> list[str]:
        """Names in a folder that end in `suffix`, without folder and suffix, sorted; hidden ones are no names."""
        found = [url.name for url in self.path(folder).glob(f"*{suffix}")]
        return sorted(name.removesuffix(suffix) for name in found if not name.startswith("."))

    def sweep(self, folder: str) -> None:
        """Nothing: a PUT that was cut leaves nothing."""


def ask(url: Url, call: Callable[[Any, Any], Answer]) -> Answer:
    """What `call(client, obstore)` gives, tried again while the store or the way to it fails.

    Raises FileNotFoundError, obstore's own errors of conditions, UserError for what no attempt mends, and Unreachable.
    """
    import obstore
    from obstore.exceptions import (
        AlreadyExistsError,
        BaseError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )

    client, began, pause = _client(url.bucket), time.monotonic(), 0.1
    while True:
        try:
            answer = call(client, obstore)
            _answered.add(url.bucket)
            return answer
        except (AlreadyExistsError, PreconditionError):
            raise
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise UserError(
                f"{url}: refused ({_reason(error)})", "see docs/object-stores.md for credentials"
            ) from error
        except (BaseError, OSError) as error:
            if "NoSuchBucket" in str(error):
                raise UserError(f"{url.bucket}: there is no such bucket", "create it, or mend the URL") from error
            if isinstance(error, FileNotFoundError):
                raise
            patience = PATIENCE_SECONDS if url.bucket in _answered else FIRST_PATIENCE_SECONDS
            if re.search(r"status code: 4(?!08|29)", str(error)) or time.monotonic() - began > patience:
                raise Unreachable(
                    f"{url}: {_reason(error)}",
                    "check the URL, endpoint, network and credentials (docs/object-stores.md)",
                ) from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


@lru_cache
def _client(bucket: str) -> Any:
    """obstore's own store. Raises UserError for settings of the environment that cannot be."""
    try:
        from obstore import store as obstore
        from obstore.exceptions import BaseError
    except ImportError as error:
        raise UserError(f"{bucket}: needs obstore ({first_line(error)})", "pip install obstore") from error
    own, options = _aws_profile(bucket), dict[str, Any](CLIENT)
    endpoints = [own.get("endpoint", ""), *(os.environ.get(name, "") for name in (*AWS_ENDPOINTS, GOOGLE_ENDPOINT))]
    if any(endpoint.startswith("http://") for endpoint in endpoints):
        options["allow_http"] = True  # who writes the endpoint so means it
    from_url: Any = obstore.from_url
    try:
        return from_url(bucket, client_options=options, retry_config={"max_retries": RETRIES}, **own)
    except (BaseError, ValueError) as error:
        raise UserError(f"{bucket}: {_reason(error)}", "see docs/object-stores.md for settings") from error


def _aws_profile(bucket: str) -> dict[str, Any]:
    """What AWS's shared files say, which obstore does not read: boto3 does. Nothing if credentials come otherwise."""
    files = [Path(os.environ.get(name, usual)).expanduser() for name, usual in AWS_FILES.items()]
    if not bucket.startswith(("s3://", "s3a://")) or any(os.environ.get(name) for name in AWS_GIVEN):
        return {}
    if not os.environ.get("AWS_PROFILE") and not any(file.is_file() for file in files):
        return {}
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise UserError(f"{bucket}: credentials in {files[0]} are read by boto3", "pip install boto3") from error
    try:
        session: Any = boto3.Session()
        if session.get_credentials() is None:  # files without any: those of the machine's role are obstore's matter
            return {}
        endpoint: str = session.client("s3", region_name=session.region_name or "us-east-1").meta.endpoint_url
    except Exception as error:  # botocore has errors of many kinds, all of them about these files
        raise UserError(f"{bucket}: {first_line(error)}", f"mend {files[0]}, {files[1]} or AWS_PROFILE") from error
    provider: Any = Boto3CredentialProvider(session)
    return {"credential_provider": provider} | ({} if ".amazonaws." in endpoint else {"endpoint": endpoint})


def _stat(found: Any) -> Stat:
    mark = {name: found[name] for name in ("e_tag", "version") if found[name]}
    return Stat(st_size=found["size"], version=next(iter(mark.values()), str(found["last_modified"])), mark=mark)


def _reason(error: BaseException) -> str:
    """obstore's errors name the cause in their first line, after what it was about."""
    return first_line(error).removesuffix(": ")
