"""Checkpoints: a Hugging Face folder plus optimizer state, published by one rename, readable on any number of ranks.

Weights are whole float32 safetensors that `AutoModelForCausalLM.from_pretrained` loads; the optimizer's moments are
whole safetensors too. Nothing is pickled. `state.json` is sealed, and holds a hash of every file beside it.
"""

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
from schemas.fingerprint import difference
from schemas.seal import seal, unseal
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

    Host memory on the first rank, beside what training holds: gathered from GPUs or from several ranks, 4 bytes a
    parameter for the weights, then, when they are written and gone, 8 for the moments; on one CPU nothing is copied.
    """
    partial = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    weights = get_model_state_dict(live, options=WHOLE)
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        _save_weights(partial, live, weights)
    del weights
    moments: Any = get_optimizer_state_dict(live, optimizer, options=WHOLE).get("state", {}) if optimizer else {}
    if ranks.first:
        if moments:
            save_file(_flat(moments), partial / OPTIMIZER)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        files = {name: _hash(partial / name) for name in _files(partial)}
        (partial / STATE).write_bytes(seal({"state": asdict(state), "files": files}))
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
    return {name: tensor.contiguous() for name, tensor in flat.items()}


def _publish(partial: Path, folder: Path) -> None:
    """Give a written checkpoint its name once every byte and every name below it is on the disk."""
    for name in _files(partial):
        fsync_file(partial / name)
    for inner in {partial, *(path for path in partial.rglob("*") if path.is_dir())}:
        fsync_folder(inner)
    if folder.exists():  # of an earlier run of this step; whoever dies here goes on from the one before it
        _delete(folder)
    partial.rename(folder)
    fsync_folder(folder.parent)


def _delete(folder: Path) -> None:
    """Take the name away first, so that nobody ever reads half a checkpoint."""
    doomed = folder.with_name(f"{TEMPORARY_PREFIX}deleted-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    """Names of the files below a checkpoint, relative to it, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def load_state(folder: Path) -> State:
    """The state of a checkpoint whose every file is as it was written. Raises UserError naming one that is not."""
    path = folder / STATE
    try:
        content = unseal(path.read_bytes())
        state, files = State(**content["state"]), dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, or of another version of tokensift ({first_line(error)})", FIX) from error
    found = {*_files(folder)} - {STATE}
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
    for path in sorted(folder.glob("step-*"))[:-keep]:
        _delete(path)
    remove_unfinished(folder)


def refuse_changes(folder: Path, stored: State, origin: dict[str, Any]) -> None:
    """Raise UserError naming each thing that differs from what the checkpoint was made of (law 14).

    Of `train.skip` only what lies behind the checkpoint: what lies ahead of it decided none of its numbers.
    """
    lines = difference(_behind(stored.origin, stored.position), _behind(origin, stored.position))
    if lines:
        raise UserError(
            f"{folder}: cannot go on with other data, models or settings:\n  " + "\n  ".join(lines),
            "restore them, or give the run another name (train.run)",
        )


def _behind(origin: dict[str, Any], position: int) -> dict[str, Any]:
    settings = origin["train"]
    skip = [[start, min(end, position)] for start, end in settings.get("skip", []) if start < position]
    return {**origin, "train": {**settings, "skip": skip}}


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed run left half written, or half deleted, in a folder."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _hash(path: Path) -> str:
    """xxh3-128 of a file's bytes: against damage, not against forgery, and as fast as the disk."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()
