"""A bucket behind a proxy that can be told to misbehave."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import boto3
import pytest

from schemas import object_store
from schemas.object_store import Url
from tests.object_store.server import Proxy, Server

BUCKET = "scores"
NO_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_CONFIG_FILE": "/nonexistent"}


@contextmanager
def forgotten() -> Iterator[None]:
    """Clients and what they were answered are those of a test alone."""
    object_store._client.cache_clear()
    yield
    object_store._client.cache_clear()
    object_store._answered.clear()


@pytest.fixture(scope="session")
def server() -> Iterator[Proxy]:
    """One server and one bucket for all tests; each test has its own name below it."""
    server = Server()
    proxy = Proxy(server.port)
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=proxy.url, **keys).create_bucket(Bucket=BUCKET)
    yield proxy
    proxy.close()
    server.close()


@pytest.fixture
def proxy(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy, passing all on, and an environment (of processes started here too) that leads to it."""
    for name in (*object_store.AWS_GIVEN, *object_store.AWS_ENDPOINTS, "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    settings = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    for name, value in (settings | NO_FILES | {"AWS_ENDPOINT_URL": server.url}).items():
        monkeypatch.setenv(name, value)
    server.trouble(0)
    with forgotten():
        yield server
        server.trouble(0)


@pytest.fixture
def root(proxy: Proxy) -> Url:
    """A name below which nothing is."""
    return Url(f"s3://{BUCKET}", uuid4().hex)
