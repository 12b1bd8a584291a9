"""The same contract in Google's words: obstore's GCS client, as the environment sets it up, over HTTP."""

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from schemas.object_store import ObjectStore, Url
from tests.object_store.conftest import BUCKET, forgotten
from tests.object_store.gcs import Front
from tests.object_store.server import Proxy
from tests.object_store.test_azure import test_ranges_of_an_object_are_read  # noqa: F401  collected again, as the next
from tests.object_store.test_object_store import (  # noqa: F401  collected again, with the fixtures of this module
    test_a_fault_of_any_kind_loses_nothing,
    test_a_listing_goes_on_after_a_page_of_names,
    test_an_object_is_replaced_only_in_the_version_that_was_seen,
    test_globs_of_a_bucket_are_those_of_fsspec,
    test_names_are_sorted_direct_and_visible_and_go_when_deleted,
    test_of_many_who_put_if_absent_at_once_one_is_told_that_it_did,
    test_put_if_absent_never_replaces_and_put_does,
    test_what_is_missing_is_a_file_not_found,
)


@pytest.fixture(scope="module")
def way(server: Proxy) -> Iterator[Proxy]:
    """The way to the front, on which faults may happen."""
    front = Front(server.target)
    way = Proxy(front.port)
    yield way
    way.close()
    front.close()


@pytest.fixture
def proxy(way: Proxy) -> Iterator[Proxy]:
    """It, passing all on."""
    way.trouble(0)
    yield way
    way.trouble(0)


@pytest.fixture
def root(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Url]:
    """A name below which nothing is."""
    account = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("GOOGLE_BASE_URL", proxy.url)
    with forgotten():
        yield Url(f"gs://{BUCKET}", uuid4().hex)


@pytest.fixture
def store(root: Url) -> ObjectStore:
    return ObjectStore(root)


def test_a_version_is_a_generation_and_every_write_has_its_own(root: Url) -> None:
    store, seen = ObjectStore(root), []
    for content in (b"one", b"one", b"two"):
        store.put("object", content)
        seen.append((root / "object").stat().mark["version"])
    assert sorted({*seen}) == seen and all(number.isdecimal() for number in seen)
