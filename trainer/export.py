"""A checkpoint as a Hugging Face folder: float32 safetensors, config, tokenizer and model card, for any program."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.errors import UserError
from trainer.card import card
from trainer.checkpoint import CARD, PARTS, STATE, State, load_state, partial_of, publish, read_sealed
from trainer.metrics import METRICS, read_metrics
from trainer.parts import WEIGHT, Parts, described, write_safetensors

MODEL = "model.safetensors"


def export(checkpoint: Path, folder: Path, state: State | None = None) -> None:
    """Make a model folder of a checkpoint whose files are as they were written. Raises UserError for one that is not.

    `state`: of a checkpoint that was written or verified just now; its files are not hashed again (12 bytes a parameter).
    Memory: some blocks, whatever the model's size; 4 bytes a parameter for families whose files name tensors otherwise
    than their code does (mixtures of experts).
    """
    state, partial = state or load_state(checkpoint), partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, ignore=shutil.ignore_patterns(PARTS, STATE))
    parts = Parts(checkpoint)
    names = sorted(name for name in parts.pieces if name.startswith(WEIGHT))
    if read_sealed(checkpoint)["renamed"]:
        _save_as_the_family_does(partial, parts, names)
        files = {}
    else:
        files = {MODEL: write_safetensors(partial / MODEL, *_streamed(parts, names))}
    metrics = read_metrics(checkpoint.parent.parent / METRICS)
    (partial / CARD).write_text(card(state, metrics), encoding="utf-8")
    publish(partial, folder, state, files, False)


def _save_as_the_family_does(folder: Path, parts: Parts, names: list[str]) -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    weights = {name: torch.empty(parts.shape(name), dtype=parts.dtype(name)) for name in names}
    for name, tensor in weights.items():
        parts.read(name, tensor)
    model.save_pretrained(folder, state_dict={name.removeprefix(WEIGHT): weights[name] for name in names})


def _streamed(parts: Parts, names: list[str]) -> tuple[dict[str, Any], Iterator[memoryview]]:
    """Header and data of a safetensors file of whole tensors."""
    names = sorted(names, key=lambda name: -parts.dtype(name).itemsize)  # each at a multiple of its items' size
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        header[name.removeprefix(WEIGHT)] = entry = described(parts.dtype(name), parts.shape(name), end)
        end = entry["data_offsets"][1]
    blocks = (block for name in names for block in parts.blocks(name))
    return header, (block.contiguous().view(-1).view(torch.uint8).numpy().data for block in blocks)


@contextmanager
def as_model(folder: Path) -> Iterator[Path]:
    """The folder of a model; while the block runs, a temporary one if it is a checkpoint."""
    if not any(folder.glob(PARTS)):
        yield folder
        return
    with TemporaryDirectory() as name:
        export(folder, Path(name) / folder.name)
        yield Path(name) / folder.name


def export_to(checkpoint: Path, folder: Path) -> None:
    """`export` for people. Raises UserError if `checkpoint` is none, or `folder` is there already."""
    if not any(checkpoint.glob(PARTS)):
        raise UserError(f"{checkpoint}: no checkpoint of a training run", "name a folder checkpoints/step-*")
    if folder.exists():
        raise UserError(f"{folder}: exists already", "name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    export(checkpoint, folder)
