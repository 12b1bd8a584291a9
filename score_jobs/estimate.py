"""The estimate: what scoring a corpus will come to, from a look at some of it. Writes nothing."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from schemas.config import Config
from schemas.conversation import Piece, templated
from schemas.errors import UserError
from schemas.models import open_tokenizer, positions, refuse_long_windows
from schemas.receipt import Layout
from schemas.shard import Window, encode_shard, shard_schema
from score_jobs.corpus import Document, read_documents
from score_jobs.encoding import encode
from score_jobs.engines import Scored, open_engine
from score_jobs.files import resolve
from score_jobs.inputs import ShardError, size_of
from score_jobs.job import prepare
from score_jobs.plan import VERSION_THREADS, cut_units
from score_jobs.survey import Surveyed, survey
from score_jobs.tables import text_column_problem
from score_jobs.worker import Job

SHARDS, DOCUMENTS = 8, 64  # shards that are read, and documents tokenised of each, evenly spread
RATE_SECONDS = 5.0
T = TypeVar("T")
NINETY_FIVE = 1.96
ASSUMED_LOG_NATS = (-0.3, 2.2)  # mean and spread of the losses that stand in for those of a model that is not run
MOST_NATS = 20.0


@dataclass(frozen=True, slots=True)
class Sample:
    """A shard that was read: characters of all its documents, and some documents, characters and tokens of each."""

    url: str
    surveyed: Surveyed
    all_characters: int
    characters: np.ndarray
    tokens: np.ndarray
    windows: list[Piece]


@dataclass(frozen=True, slots=True)
class Amount:
    """An estimate and the bounds that hold it with 95 %, as far as chance in the sample goes."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Speed:
    """What a moment's scoring gave: tokens a second of one worker, and losses and entropies in nats."""

    note: str
    tokens_per_second: float | None = None
    losses: np.ndarray | None = None
    entropies: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a whole job comes to. Bytes of input are as stored; None was not measured, `note` says why.

    `worker_hours` and `hours` are of the units that are left, by the forward alone: of all workers, and from start to
    end, the last workers waited for.
    """

    shards: int
    shards_sampled: int
    broken: list[str]
    input_bytes: int
    documents: int
    units: int
    units_done: int
    tokens: Amount
    tokens_sampled: int
    bytes_per_token: float
    stored_bytes: float
    workers: int
    gpus: float
    worker_tokens_per_second: float | None
    worker_hours: float | None
    hours: float | None
    note: str


def estimate(config: Config, rate: bool = True) -> Estimate:
    """Check what is cheap to check, sample the corpus, and time the engine on the sample unless `rate` is false.

    Raises UserError for what `score` would raise it for, as far as it can be known without reading the whole corpus.
    """
    layout = Layout(config.score.output)
    job = prepare(config, layout)
    refuse_long_windows(positions(job.model, "score.model"), config.context.window, job.model)
    urls = resolve(config.corpus)
    with ThreadPoolExecutor(VERSION_THREADS) as pool:
        sizes = dict(zip(urls, pool.map(size_of, urls), strict=True))
    tokenizer = templated(open_tokenizer(job.model, "score.model"), job.corpus)
    looks = [_sample(job, tokenizer, url) for url in _spread(urls, SHARDS)]
    samples, broken = (
        [item for item in looks if isinstance(item, Sample)],
        [str(item) for item in looks if isinstance(item, ShardError)],
    )
    if not samples:
        raise UserError(f"corpus: none of {len(broken)} shards can be scored ({broken[0]})", "mend it or corpus.text")
    tokens = estimate_tokens(samples, sum(sizes.values()) - sum(sample.surveyed.bytes for sample in samples))
    units, documents = _count(config, samples, sizes)
    done = len(layout.committed())
    speed = _speed(job, samples) if rate else Speed(note="rate not measured, as asked")
    stored = stored_bytes(job, samples, speed, tokens.value, units)
    hours = tokens.value / units / speed.tokens_per_second / 3600 if units and speed.tokens_per_second else None
    left = max(0, units - done)
    return Estimate(
        shards=len(urls),
        shards_sampled=len(samples),
        broken=broken,
        input_bytes=sum(sizes.values()),
        documents=documents,
        units=units,
        units_done=done,
        tokens=tokens,
        tokens_sampled=int(sum(sample.tokens.sum() for sample in samples)),
        bytes_per_token=stored / tokens.value if tokens.value else 0.0,
        stored_bytes=stored,
        workers=config.score.workers,
        gpus=config.score.workers * config.score.gpus_per_worker,
        worker_tokens_per_second=speed.tokens_per_second,
        worker_hours=left * hours if hours is not None else None,
        hours=-(-left // config.score.workers) * hours if hours is not None else None,
        note=speed.note,
    )


def estimate_tokens(samples: Sequence[Sample], bytes_unseen: int) -> Amount:
    """Tokens of the sampled shards and of `bytes_unseen` of input like them.

    Characters of a sampled shard are known; tokens a character vary from document to document, and characters a byte
    of input from shard to shard.
    """
    tokens = np.concatenate([np.zeros(0), *[sample.tokens for sample in samples]])
    if not tokens.sum():
        return Amount(value=0.0, low=0.0, high=0.0)
    characters = np.concatenate([sample.characters for sample in samples])
    ratio = tokens.sum() / characters.sum()
    sizes = np.array([sample.surveyed.bytes for sample in samples], dtype=np.float64)
    known = np.array([sample.all_characters for sample in samples], dtype=np.float64)
    unseen = bytes_unseen * known.sum() / sizes.sum()
    value = float(ratio * (known.sum() + unseen))
    documents = sum(sample.surveyed.documents for sample in samples)
    of_ratio = _error(tokens - ratio * characters, documents) / tokens.mean()
    of_unseen = _error(known / sizes, round(len(samples) * (1 + bytes_unseen / sizes.sum()))) / np.mean(known / sizes)
    share = unseen / (known.sum() + unseen)
    error = NINETY_FIVE * float(np.hypot(of_ratio, share * of_unseen))
    return Amount(value=value, low=value * max(0.0, 1 - error), high=value * (1 + error))


def _error(values: np.ndarray, population: int) -> float:
    """Standard error of the mean of some out of a finite population."""
    if len(values) < 2 or len(values) >= population:
        return 0.0
    return float(np.std(values, ddof=1) / np.sqrt(len(values)) * np.sqrt(1 - len(values) / population))


def stored_bytes(job: Job, samples: Sequence[Sample], speed: Speed, tokens: float, units: int) -> float:
    """Bytes of all score shards: the sample's windows are encoded in pieces as large as units, or as there is sample."""
    windows = [window for sample in samples for window in sample.windows]
    if not windows or not units:
        return 0.0
    trained = bool(job.corpus.messages)
    schema = shard_schema(job.fingerprint["tokenizer"]["size"], job.score.entropy, trained=trained)
    generator, values = np.random.default_rng(0), {}
    for name, known in (("ref_loss", speed.losses), ("ref_entropy", speed.entropies)):
        made = np.minimum(generator.lognormal(*ASSUMED_LOG_NATS, 100_000), MOST_NATS)
        values[name] = (made if known is None else known).astype(np.float16)
    metadata = {"fingerprint": job.fingerprint, "unit": "x" * 40}
    empty, full, held, piece = len(encode_shard([], schema, metadata)), 0, 0, []
    for number, one in enumerate(windows, 1):
        made = {name: generator.choice(drawn, len(one.tokens)) for name, drawn in values.items()}
        name = f"https://example.org/{number}"
        piece.append(Window(name, 0, one.tokens, row=number, trained=one.trained, **made))
        if sum(len(window.tokens) for window in piece) >= tokens / units or number == len(windows):
            full += len(encode_shard(piece, schema, metadata)) - empty
            held, piece = held + sum(len(window.tokens) for window in piece), []
    return full / held * tokens + empty * units


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly spread."""
    count = min(most, len(items))
    return [items[len(items) * i // count] for i in range(count)]


def _sample(job: Job, tokenizer: Any, url: str) -> Sample | ShardError:
    """Read a shard as the job would, and tokenise some of it."""
    try:
        surveyed = survey(url)
        problem = url.endswith(".parquet") and text_column_problem(surveyed.columns, job.corpus)
        if problem:
            return ShardError(f"{url}: {problem}")
        chosen = set(_spread(range(surveyed.documents), DOCUMENTS))
        characters, documents = 0, list[Document]()
        for row in read_documents(url, job.corpus, 0, surveyed.documents):
            document = row if isinstance(row, Document) else Document(row.row, row.id, "")
            characters += len(document.text)
            documents += [document] if row.row in chosen else []
    except ShardError as error:
        return error
    encoded = encode(tokenizer, documents, job.context)
    pieces = [[] if isinstance(found, str) else found for found in encoded]
    return Sample(
        url=url,
        surveyed=surveyed,
        all_characters=characters,
        characters=np.array([len(document.text) for document in documents], dtype=np.float64),
        tokens=np.array([sum(len(one.tokens) for one in windows) for windows in pieces], dtype=np.float64),
        windows=[window for windows in pieces for window in windows],
    )


def _count(config: Config, samples: Sequence[Sample], sizes: dict[str, int]) -> tuple[int, int]:
    """Units and documents of all shards; of one that was not surveyed, as if it unpacked as the others do."""
    known = {sample.url: sample.surveyed for sample in samples}
    size = sum(surveyed.bytes for surveyed in known.values())
    unpacked = sum(surveyed.unpacked_bytes for surveyed in known.values()) / max(1, size)
    rows = sum(surveyed.documents for surveyed in known.values()) / max(1, size)
    units = documents = 0
    for url, bytes_ in sizes.items():
        guess = Surveyed(
            input_hash="", bytes=bytes_, unpacked_bytes=round(bytes_ * unpacked), documents=round(bytes_ * rows)
        )
        surveyed = known.get(url, guess)
        documents += surveyed.documents
        units += len(cut_units(url, surveyed, config.score.unit_bytes, ""))
    return units, documents


def _speed(job: Job, samples: Sequence[Sample]) -> Speed:
    """Time one worker's engine on the sample: the first calls are small and warm it up, the last one counts."""
    if job.score.gpus_per_worker and not torch.cuda.is_available():
        return Speed(note="rate not measured: this machine has no GPU")
    torch.set_num_threads(job.score.cpus_per_worker)
    engine = open_engine(job.model, job.context, job.score)
    windows = [one.tokens for sample in samples for one in sample.windows if len(one.tokens) > 1]
    windows = [windows[i] for i in np.random.default_rng(0).permutation(len(windows))]  # short and long as they come
    count, seconds, scored = 1, 0.0, list[Scored]()
    while seconds < RATE_SECONDS and count <= len(windows):
        start = time.perf_counter()
        scored = engine.score(windows[:count])
        seconds = time.perf_counter() - start
        count = min(2 * count, len(windows)) if count < len(windows) else count + 1
    if not scored:
        return Speed(note="rate not measured: the sample has no tokens to score")
    tokens = sum(len(window.loss) for window in scored)
    entropies = [window.entropy[1:] for window in scored if window.entropy is not None]
    return Speed(
        note=f"rate measured on {tokens:,} tokens of the sample, in {seconds:.1f} s",
        tokens_per_second=tokens / seconds,
        losses=np.concatenate([window.loss[1:] for window in scored]),
        entropies=np.concatenate(entropies) if entropies else None,
    )
