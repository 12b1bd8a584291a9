"""Checkpoints: a Hugging Face folder plus optimizer state, published by one rename, readable on any number of ranks.

Weights are whole float32 safetensors that `AutoModelForCausalLM.from_pretrained` loads; the optimizer's moments are
whole safetensors too. Nothing is pickled. `state.json` holds a hash of every file beside it, and of itself.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from schemas.errors import UserError, first_line
from schemas.fingerprint import difference, digest
from schemas.store import TEMPORARY_PREFIX, fsync_file, fsync_folder
from trainer.live import Live
from trainer.ranks import Ranks

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered on the first rank alone
EVERY_RANK = StateDictOptions(full_state_dict=True)
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
FIX = "delete this checkpoint; training goes on from the one before it"


@dataclass(frozen=True, slots=True)
class State:
    """Everything that resume needs besides tensors. `position` is the whole data state.

    `origin` is all that decides the numbers: base, dataset, tokenizer, context, settings, versions.
    """

    step: int
    position: int
    tokens_seen: int
    tokens_selected: int
    origin: dict[str, Any]


def save(
    folder: Path, live: Live, tokenizer: Any, optimizer: torch.optim.Optimizer | None, state: State, ranks: Ranks
) -> None:
    """Write a checkpoint to `folder`; every rank must call, the first one writes.

    Peak host memory on the first rank: 4 bytes a parameter for the weights, and 8 more with an optimizer.
    """
    weights = get_model_state_dict(live, options=WHOLE)
    moments: Any = get_optimizer_state_dict(live, optimizer, options=WHOLE).get("state", {}) if optimizer else {}
    if ranks.first:
        partial = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        _save_weights(partial, live, weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if moments:
            save_file(_flat(moments), partial / OPTIMIZER)
        _write_state(partial, state)
        _publish(partial, folder)
    ranks.wait()


def _save_weights(partial: Path, live: Live, weights: dict[str, Any]) -> None:
    # Gathering copies a tied weight under each of its names; a Hugging Face folder holds it once.
    once = {name for name, _ in live.model.named_parameters()}
    tied = {name for name, _ in live.model.named_parameters(remove_duplicate=False)} - once
    inner = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    live.model.save_pretrained(partial, state_dict={name: inner[name] for name in inner if name not in tied})


def _flat(moments: dict[str, Any]) -> dict[str, torch.Tensor]:
    flat = {f"{name}|{key}": torch.as_tensor(moment[key]) for name, moment in moments.items() for key in MOMENTS}
    return {name: tensor.contiguous().clone() for name, tensor in flat.items()}  # safetensors refuses shared memory


def _write_state(folder: Path, state: State) -> None:
    files = {path.name: _hash(path) for path in sorted(folder.iterdir())}
    content = {"state": asdict(state), "files": files}
    (folder / STATE).write_text(json.dumps({**content, "hash": digest(content)}, indent=1, sort_keys=True) + "\n")


def _publish(partial: Path, folder: Path) -> None:
    for path in partial.iterdir():
        fsync_file(path)
    fsync_folder(partial)
    if folder.exists():  # an earlier one of this name is no longer wanted: it was damaged, or of a shorter run
        shutil.rmtree(folder)
    partial.rename(folder)
    fsync_folder(folder.parent)


def load_state(folder: Path) -> State:
    """The state of a checkpoint whose every file is as it was written. Raises UserError naming one that is not."""
    path = folder / STATE
    try:
        raw = json.loads(path.read_text())
        stored, content = raw.pop("hash"), raw
        state, files = State(**raw["state"]), dict(raw["files"])
        if stored != digest(content):
            raise ValueError("its hash does not match")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or of another version of tokensift ({first_line(error)})", FIX) from error
    found = {file.name for file in folder.iterdir()} - {STATE}
    for name in sorted(files.keys() | found):
        if name not in found:
            raise UserError(f"{folder / name}: missing", FIX)
        if name not in files:
            raise UserError(f"{folder / name}: not one of the checkpoint's own files", "move it elsewhere")
        if _hash(folder / name) != files[name]:
            raise UserError(f"{folder / name}: not the bytes that were written", FIX)
    return state


def load_optimizer(folder: Path, live: Live, optimizer: torch.optim.Optimizer) -> None:
    """Restore the moments, whatever number of ranks they were saved on."""
    state: dict[str, Any] = {}
    try:
        for name, tensor in load_file(folder / OPTIMIZER).items():
            parameter, key = name.rsplit("|", 1)
            state.setdefault(parameter, {})[key] = tensor
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / OPTIMIZER}: cannot be read ({first_line(error)})", FIX) from error
    # Hyper-parameters come from the config; only the moments are state.
    groups: Any = get_optimizer_state_dict(live, optimizer, options=EVERY_RANK)["param_groups"]
    set_optimizer_state_dict(live, optimizer, {"state": state, "param_groups": groups}, options=EVERY_RANK)


def newest(folder: Path) -> Path | None:
    """The newest published checkpoint below `folder`, or None."""
    found = sorted(path for path in folder.glob("step-*") if path.is_dir())
    return found[-1] if found else None


def prune(folder: Path, keep: int, ranks: Ranks) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed run left half written."""
    if not ranks.first:
        return
    for path in (*sorted(folder.glob("step-*"))[:-keep], *folder.glob(f"{TEMPORARY_PREFIX}*")):
        shutil.rmtree(path, ignore_errors=True)


def refuse_changes(folder: Path, stored: State, origin: dict[str, Any]) -> None:
    """Raise UserError naming each thing that differs from what the checkpoint was made of (law 14)."""
    lines = difference(stored.origin, origin)
    if lines:
        raise UserError(
            f"{folder}: cannot go on with other data, models or settings:\n  " + "\n  ".join(lines),
            "restore them, or give the run another name (train.run)",
        )


def remove_unfinished(output: Path) -> None:
    """Delete what a killed run left half written in its output folder."""
    for path in output.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _hash(path: Path) -> str:
    """xxh3-128 of a file's bytes: against damage, not against forgery, and as fast as the disk."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()
