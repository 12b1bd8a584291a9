"""`tokensift init`: the smallest config for one's own corpus and model, written after a look at both."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.progress import say
from schemas.config import Context, Corpus, load_config
from schemas.errors import UserError
from schemas.models import local_model, open_tokenizer, positions
from schemas.store import FolderStore
from schemas.window import encode_documents
from score_jobs.corpus import Document, corpus_documents

LONGEST_WINDOW = 2048
LOOK_DOCUMENTS = 20


def write_config(
    path: Path, name: str, base: str, corpus: list[str], curated: list[str], reference: str | None, text: str
) -> None:
    """Look at the models and the corpus, write the config, say what to type next.

    Raises UserError if the file exists, or naming what of the answers cannot work.
    """
    if path.exists():
        raise UserError(f"{path}: is there already", "give another --name, or delete it")
    if bool(curated) == bool(reference):
        raise UserError(
            "--curated, --reference: give one of the two",
            "curated files train a reference here; or name a finished one (self-reference: the base itself)",
        )
    folder = local_model(base, "--base")
    tokenizer = open_tokenizer(folder, "--base")
    context = Context(
        window=min(positions(folder, "--base") or LONGEST_WINDOW, LONGEST_WINDOW),
        bos=tokenizer.bos_token_id is not None,
        eos=tokenizer.eos_token_id is not None,
    )
    for field, paths in (("--corpus", corpus), ("--curated", curated)):
        if paths:
            say(f"{field}: {_first_documents(field, paths, text, tokenizer, context)}")
    content = _render(name, base, corpus, curated, reference, text, context)
    FolderStore(path.parent).put(path.name, content.encode())
    load_config(path)
    say(f"wrote {path}; next:")
    steps = ["reference"] * bool(curated) + ["score", "train", "train --objective clm"]
    for step in steps:
        say(f"  tokensift {step} -c {path}")


def _first_documents(field: str, paths: list[str], text: str, tokenizer: object, context: Context) -> str:
    """What the first documents are, in a sentence. Raises UserError if none can be used."""
    rows = list(islice(corpus_documents(Corpus(paths=paths, text=text)), LOOK_DOCUMENTS))
    found = [row for row in rows if isinstance(row, Document)]
    if not found:
        reason = rows[0].reason if rows and not isinstance(rows[0], Document) else "the files are empty"
        raise UserError(f"{field}: {', '.join(paths)}: no usable document ({reason})", "name the text column by --text")
    windows = encode_documents(tokenizer, [row.text for row in found], context)
    tokens = sum(len(window) for pieces in windows for window in pieces)
    return f"{len(found)} of the first {len(rows)} documents can be used, {tokens / len(found):,.0f} tokens each"


def _render(
    name: str, base: str, corpus: list[str], curated: list[str], reference: str | None, text: str, context: Context
) -> str:
    gpus = torch.cuda.device_count()
    size = {} if gpus else {"tokens_per_step": 16_384, "dtype": "float32"}  # what a laptop's CPU does in seconds
    device = {"gpus_per_worker": 1, "workers": gpus} if gpus else {"dtype": "float32"}
    content: dict[str, Any] = {
        "name": name,
        "base": base,
        "context": context.model_dump(),
        "corpus": {"paths": corpus, "text": text},
    }
    if curated:
        content["reference"] = {"corpus": {"paths": curated, "text": text}, "train": {"epochs": 3, **size}}
    content["score"] = {"model": reference or "{root}/reference/final", **device}
    content["train"] = {"objective": "slm", "keep": 0.6, "epochs": 1, **size}
    head = f"# All that is made goes to runs/{name}. Every other field has a default: see configs/ and schemas/config.py.\n"
    return head + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
