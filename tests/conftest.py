"""What every test may use: a tiny model, a small corpus in every format, configs over them, and scored data.

The session fixtures are shared: a test that wants to change one copies it first.
"""

import gzip
import io
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# This folder holds `schemas/` and so on too: the real packages must be found first, however pytest is called.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zstandard
from hypothesis import settings
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from schemas.config import Config

settings.register_profile("tests", deadline=None)  # a busy machine is no failure
settings.load_profile("tests")
ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 512
WINDOW = 64
FORMATS = ("jsonl.zst", "jsonl.gz", "jsonl", "parquet")
SENTENCES = (
    "Let $x_{%d} = \\frac{%d}{%d}$ be a root of the polynomial; then $f(x) = 0$.",
    "The sum of the first %d odd numbers is $%d^2$, as %d pebbles in a square show.",
    "Theorem %d. For every $\\varepsilon > 0$ there is $\\delta > 0$ with $|x - %d| < \\delta \\Rightarrow |y| < %d$.",
    "Subscribe now! %d offers, %d cookies, %d partners; read our privacy policy.",
    "漢字 %d と数学: naïve café Ω ≠ ∅, ∑_{i=%d}^{%d} i — «так» 🧮.",
    "def f(n):\n    return n * %d + %d  # O(%d)\n",
)


def make_documents(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Documents in OpenWebMath's columns; lengths vary from a few tokens to several windows."""
    rng = random.Random(seed)
    documents = []
    for index in range(count):
        sentences = [rng.choice(SENTENCES) % tuple(rng.randrange(100) for _ in "abc") for _ in range(index % 7 + 1)]
        documents.append(
            {
                "url": f"https://example.org/{seed}/{index}",
                "text": " ".join(sentences) if index % 11 else "x = 1",
                "date": "2023-01-01 00:00:00",
                "metadata": '{"extraction_info": {}}',
            }
        )
    return documents


def write_documents(path: Path, documents: list[Any], frames: int = 2) -> Path:
    """Write documents in the format that the name asks for; compressed files hold `frames` frames or members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(documents), path, row_group_size=max(1, len(documents) // frames))
        return path
    lines = [(json.dumps(item) + "\n").encode() for item in documents]
    step = -(-len(lines) // frames) or 1
    parts = [b"".join(lines[start : start + step]) for start in range(0, len(lines), step)]
    if path.suffix == ".zst":
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        path.write_bytes(b"".join(compressor.compress(part) for part in parts))
    elif path.suffix == ".gz":
        path.write_bytes(b"".join(_gzip(part) for part in parts))
    else:
        path.write_bytes(b"".join(parts))
    return path


def _gzip(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as handle:
        handle.write(data)
    return buffer.getvalue()


def build_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random two-layer Llama and a byte-level BPE tokenizer: bos 0 `<s>`, eos 1 `</s>`."""
    trained = ByteLevelBPETokenizer()
    texts = [document["text"] for document in make_documents(60, seed=99)]
    trained.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,  # losses that differ from token to token, as a trained model's do
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus_tools() -> SimpleNamespace:
    """`make_documents(count, seed)`, `write_documents(path, documents, frames)`, `build_tiny_model(folder, seed)`."""
    return SimpleNamespace(
        make_documents=make_documents,
        write_documents=write_documents,
        build_tiny_model=build_tiny_model,
        formats=FORMATS,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random tiny Llama (hidden 32, 2 layers, 512 positions and tokens) with its tokenizer."""
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards `part-<n>.<format>`, 24 good documents each; the plain .jsonl ends with three bad ones."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, suffix in enumerate(FORMATS):
        documents: list[Any] = make_documents(24, seed=number)
        if suffix == "jsonl":
            documents += [{"url": "https://bad/empty", "text": " \n"}, {"url": "https://bad/missing"}, ["no", "object"]]
        write_documents(folder / f"part-{number}.{suffix}", documents)
    return folder


@pytest.fixture(scope="session")
def make_config(tiny_model: Path, corpus_folder: Path) -> Callable[..., Config]:
    """`make_config(folder, {"score.entropy": True, ...})`: a Config whose outputs lie in `folder`.

    Window 64, float32, about eight units over `corpus_folder`; every dotted field can be overridden.
    """

    def make(folder: Path, overrides: dict[str, Any] | None = None) -> Config:
        raw: dict[str, Any] = {
            "name": "test",
            "base": str(tiny_model),
            "context": {"window": WINDOW},
            "corpus": {"paths": [str(corpus_folder / "part-*")]},
            "score": {
                "model": str(tiny_model),
                "output": str(folder / "scores"),
                "dtype": "float32",
                "batch_tokens": 4 * WINDOW,
                "unit_bytes": 3_000,
            },
            "train": {
                "output": str(folder / "train"),
                "objective": "slm",
                "epochs": 1,
                "tokens_per_step": 8 * WINDOW,
                "micro_rows": 2,
                "shuffle_groups": 2,
                "learning_rate": 1e-3,
                "dtype": "float32",
            },
        }
        for dotted, value in (overrides or {}).items():
            *parents, leaf = dotted.split(".")
            node = raw
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        return Config.model_validate(raw)

    return make


@pytest.fixture(scope="session")
def write_config() -> Callable[[Config, Path], Path]:
    """`write_config(config, path)`: the config as the YAML file that the command line reads."""

    def write(config: Config, path: Path) -> Path:
        path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
        return path

    return write


@pytest.fixture(scope="session")
def score_here() -> Callable[[Config], Config]:
    """`score_here(config)`: a whole score dataset made in this process, without Ray."""
    from transformers import AutoTokenizer

    from schemas.conversation import templated
    from schemas.fingerprint import dataset_fingerprint
    from schemas.models import local_model
    from schemas.receipt import Layout, write_complete, write_dataset
    from score_jobs.plan import plan
    from score_jobs.worker import Job, Worker

    def run(config: Config) -> Config:
        layout, model = Layout(config.score.output), local_model(config.score.model)
        layout.make()
        tokenizer = templated(AutoTokenizer.from_pretrained(model), config.corpus)
        fingerprint = dataset_fingerprint(tokenizer, model, config.corpus, config.context, config.score)
        write_dataset(layout, fingerprint)
        worker = Worker(Job(model, config.corpus, config.context, config.score, fingerprint))
        inventory = layout.root / ".inventory.json"
        planned = plan(config.corpus, fingerprint, config.score.unit_bytes, inventory, lambda done, total: None)
        assert not planned.broken
        for unit in planned.units:
            worker.score(unit)
        write_complete(layout, [unit.name for unit in planned.units])
        return config

    return run


@pytest.fixture(scope="session")
def scores(
    make_config: Callable[..., Config], score_here: Callable[[Config], Config], tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """A finished score dataset with entropies (`config.score.output`); read it, never write to it."""
    return score_here(make_config(tmp_path_factory.mktemp("scored"), {"score.entropy": True}))
