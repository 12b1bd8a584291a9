"""The same contract against Microsoft's own emulator, where it is installed: `npm install --global azurite`."""

import base64
import hashlib
import hmac
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen
from uuid import uuid4

import pytest

from schemas.object_store import ObjectStore, Url
from tests.helpers import free_port
from tests.object_store.conftest import forgotten
from tests.object_store.test_object_store import (  # noqa: F401  collected again, with the fixtures of this module
    test_a_listing_goes_on_after_a_page_of_names,
    test_an_object_is_replaced_only_in_the_version_that_was_seen,
    test_globs_of_a_bucket_are_those_of_fsspec,
    test_names_are_sorted_direct_and_visible_and_go_when_deleted,
    test_of_many_who_put_if_absent_at_once_one_is_told_that_it_did,
    test_put_if_absent_never_replaces_and_put_does,
    test_what_is_missing_is_a_file_not_found,
)

AZURITE = shutil.which("azurite-blob")
pytestmark = pytest.mark.skipif(AZURITE is None, reason="azurite is not installed")
# What every emulator of Azure Storage has.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
WRITER = """
import sys
from schemas.object_store import ObjectStore, Url
print("writing", flush=True)
ObjectStore(Url.parse(sys.argv[1])).put("killed", bytes(int(sys.argv[2])))
"""
BYTES, DELAYS = 64 << 20, (0.0, 0.05, 0.1, 0.3)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert AZURITE
    port = free_port()
    options = ["--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry", "--silent"]
    process = subprocess.Popen(
        [AZURITE, *options, "--blobPort", str(port)],
        cwd=tmp_path_factory.mktemp("azurite"), start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            make_container(address, "scores")
            break
        except (HTTPError, URLError):
            time.sleep(0.1)
    yield address
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def make_container(address: str, name: str) -> None:
    """By hand: obstore makes none."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    lines = [f"{header}:{value}\n" for header, value in sorted(headers.items())]
    signed = "PUT" + "\n" * 12 + "".join(lines) + f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers |= {"Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}", "Content-Length": "0"}
    urlopen(Request(f"{address}/{ACCOUNT}/{name}?restype=container", method="PUT", headers=headers))


@pytest.fixture
def root(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Url]:
    """A name in the emulator below which nothing is."""
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", address)
    with forgotten():
        yield Url("az://scores", uuid4().hex)


@pytest.fixture
def store(root: Url) -> ObjectStore:
    return ObjectStore(root)


def test_ranges_of_an_object_are_read(root: Url) -> None:
    content = os.urandom(100_000)
    ObjectStore(root).put("object", content)
    file = (root / "object").open()
    file.seek(-10, 2)
    assert (root / "object").read_range(12_345, 777) == content[12_345 : 12_345 + 777] and file.read() == content[-10:]


@pytest.mark.slow
def test_a_killed_writer_leaves_the_whole_object_or_none(root: Url) -> None:
    for delay in DELAYS:
        command = [sys.executable, "-c", WRITER, str(root), str(BYTES)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as writer:
            assert writer.stdout and writer.stdout.readline() == b"writing\n"
            time.sleep(delay)
            writer.kill()
        assert not (root / "killed").exists() or (root / "killed").stat().st_size == BYTES
        ObjectStore(root).delete("killed")
