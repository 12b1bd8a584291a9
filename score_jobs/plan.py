"""The plan: which units a corpus makes, named from input bytes and settings."""

import re
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from schemas.config import Corpus
from schemas.disk import writing
from schemas.errors import UserError
from schemas.place import Place, open_store
from schemas.seal import digest, seal, unseal
from score_jobs.files import resolve
from score_jobs.inputs import ShardError, version_of
from score_jobs.lines import START, Mark
from score_jobs.survey import Surveyed, survey_here
from score_jobs.tables import text_column_problem

VERSION_THREADS = 8
# Bounds of a unit, which no text reaches: text unpacks to some 4 times its bytes, and 64 MB of it are 100,000 pages.
MAX_UNPACKING = 16
MAX_UNIT_DOCUMENTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows `first` to `end` (exclusive) of one shard: the least work that a crash can cost.

    `mark`: where in the shard reading may begin.
    """

    name: str
    url: str
    input_hash: str
    first: int
    end: int
    input_bytes: int
    mark: Mark = START


@dataclass(frozen=True, slots=True)
class Plan:
    """Units in order, and one line for each shard that cannot be read."""

    units: list[Unit]
    broken: list[str]


@dataclass(frozen=True, slots=True)
class Entry:
    """What a shard held when its file had this version."""

    version: str
    surveyed: Surveyed


_INVENTORY = TypeAdapter(dict[str, Entry])
# Surveys shards, each once, and tells what it found of each.
Surveyor = Callable[[list[str], Callable[[str, Surveyed | ShardError], None]], None]


def plan(
    corpus: Corpus,
    fingerprint: dict[str, Any],
    unit_bytes: int,
    inventory: Place,
    progress: Callable[[int, int], None],
    surveyor: Surveyor = survey_here,
) -> Plan:
    """Survey the corpus's shards and cut them into units.

    `inventory` caches what a survey found, by the file's version, so that a second plan opens no shard. Raises
    UserError if no shard at all has the text column.
    """
    urls = resolve(corpus)
    entries = _entries(urls, inventory, progress, surveyor)
    settings = digest(fingerprint)
    units: list[Unit] = []
    broken: list[str] = []
    without_text: list[str] = []
    for url in urls:
        entry = entries[url]
        if isinstance(entry, ShardError):
            broken.append(str(entry))
        elif url.endswith(".parquet") and (problem := text_column_problem(entry.surveyed.columns, corpus)):
            without_text.append(f"{url}: {problem}")
        else:
            units += cut_units(url, entry.surveyed, unit_bytes, settings)
    if len(without_text) == len(urls):
        raise UserError(f"corpus.text: no shard has it ({without_text[0]})", "name the column that holds the text")
    return Plan(units=units, broken=broken + without_text)


def _entries(
    urls: list[str], inventory: Place, progress: Callable[[int, int], None], surveyor: Surveyor
) -> dict[str, Entry | ShardError]:
    """What each shard holds, or the error that stands for it; what changed since the last inventory is surveyed."""
    known = _read_inventory(inventory)
    with ThreadPoolExecutor(VERSION_THREADS) as pool:
        versions = dict(zip(urls, pool.map(_version_or_error, urls), strict=True))
    entries: dict[str, Entry | ShardError] = {}
    for url, version in versions.items():
        if isinstance(version, ShardError):
            entries[url] = version
        elif url in known and known[url].version == version:
            entries[url] = known[url]
    progress(len(entries), len(urls))

    def found(url: str, result: Surveyed | ShardError) -> None:
        version = versions[url]
        assert isinstance(version, str)
        entries[url] = result if isinstance(result, ShardError) else Entry(version=version, surveyed=result)
        progress(len(entries), len(urls))

    try:
        if unknown := [url for url in urls if url not in entries]:
            surveyor(unknown, found)
    finally:  # an interrupted survey is not begun anew
        known |= {url: entry for url, entry in entries.items() if isinstance(entry, Entry)}
        with writing(inventory):
            store = open_store(inventory.parent)
            store.make("")
            store.put(inventory.name, seal({"shards": _INVENTORY.dump_python(known)}))
    return entries


def _version_or_error(url: str) -> str | ShardError:
    try:
        return version_of(url)
    except ShardError as error:
        return error


def _read_inventory(path: Place) -> dict[str, Entry]:
    """What earlier surveys found. A cache: one that is missing, damaged or of another version is made anew."""
    try:
        return _shards(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _shards(inventory: bytes) -> dict[str, Entry]:
    return _INVENTORY.validate_python(unseal(inventory).get("shards"))


def known_units(inventory: bytes, fingerprint: dict[str, Any]) -> list[Unit]:
    """The units of all shards that an inventory knows, without a look at any of them. Raises ValueError if damaged."""
    shards = _shards(inventory)
    unit_bytes, settings = fingerprint["scorer"]["unit_bytes"], digest(fingerprint)
    return [unit for url, known in shards.items() for unit in cut_units(url, known.surveyed, unit_bytes, settings)]


def cut_units(url: str, surveyed: Surveyed, unit_bytes: int, settings: str) -> list[Unit]:
    """Equal ranges of a shard's documents, about `unit_bytes` of input each.

    They are smaller where so much input unpacks to more than a worker should hold. Example: 10 documents in 250 bytes
    at 100 bytes a unit are rows 0 to 5 and 5 to 10.
    """
    documents = surveyed.documents
    count = max(
        round(surveyed.bytes / unit_bytes),
        -(-surveyed.unpacked_bytes // (MAX_UNPACKING * unit_bytes)),
        -(-documents // MAX_UNIT_DOCUMENTS),
    )
    count = max(1, min(documents, count))
    edges = [documents * i // count for i in range(count + 1)]
    marks = [START, *surveyed.marks]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", url.rsplit("/", 1)[-1].split(".")[0])[:64]
    return [
        Unit(
            name=f"{stem}-{i:05d}-{digest([surveyed.input_hash, first, end, settings])}",
            url=url,
            input_hash=surveyed.input_hash,
            first=first,
            end=end,
            input_bytes=surveyed.bytes // count,
            mark=marks[bisect_right(marks, first, key=lambda mark: mark.row) - 1],
        )
        for i, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True))
        if end > first
    ]
