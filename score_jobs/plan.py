"""The plan: which units a corpus makes, named from input bytes and settings."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from schemas.config import Corpus
from schemas.fingerprint import digest
from schemas.store import write_atomic
from score_jobs.corpus import ShardError, resolve, survey, version_of


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows `first` to `end` (exclusive) of one shard: the least work that a crash can cost."""

    name: str
    url: str
    input_hash: str
    first: int
    end: int
    input_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Units in order, and one line for each shard that cannot be read."""

    units: list[Unit]
    broken: list[str]


def plan(
    corpus: Corpus, fingerprint: dict, unit_bytes: int, inventory: Path, progress: Callable[[int, int], None]
) -> Plan:
    """Survey the corpus's shards and cut them into units.

    `inventory` caches what a survey found, by the file's version, so that a second plan opens no shard.
    """
    urls = resolve(corpus)
    known: dict[str, list] = json.loads(inventory.read_text()) if inventory.exists() else {}
    units: list[Unit] = []
    broken: list[str] = []

    def look(url: str) -> list | str:
        version = version_of(url)
        if url in known and known[url][0] == version:
            return known[url]
        try:
            return [version, *survey(url)]
        except ShardError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        for done, (url, found) in enumerate(zip(urls, pool.map(look, urls), strict=True), 1):
            progress(done, len(urls))
            if isinstance(found, str):
                broken.append(found)
                continue
            known[url] = found
            units += cut_units(url, *found[1:], unit_bytes=unit_bytes, settings=digest(fingerprint))
    write_atomic(inventory, json.dumps(known, indent=0, sort_keys=True).encode())
    return Plan(units, broken)


def cut_units(url: str, input_hash: str, size_bytes: int, documents: int, unit_bytes: int, settings: str) -> list[Unit]:
    """Equal ranges of a shard's documents, about `unit_bytes` of input each."""
    count = max(1, min(documents, round(size_bytes / unit_bytes)))
    edges = [documents * i // count for i in range(count + 1)]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", url.rsplit("/", 1)[-1].split(".")[0])[:64]
    return [
        Unit(
            name=f"{stem}-{i:05d}-{digest([input_hash, first, end, settings])}",
            url=url,
            input_hash=input_hash,
            first=first,
            end=end,
            input_bytes=size_bytes // count,
        )
        for i, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True))
        if end > first
    ]
