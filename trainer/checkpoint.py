"""Checkpoints: a Hugging Face folder plus optimizer state, published by one rename, readable on any number of ranks.

Weights are whole float32 safetensors that `AutoModelForCausalLM.from_pretrained` loads; the optimizer's moments are
whole safetensors too. Nothing is pickled.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from schemas.errors import UserError
from schemas.files import fsync_file, fsync_folder
from trainer.live import Live
from trainer.ranks import Ranks

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered on the first rank alone
EVERY_RANK = StateDictOptions(full_state_dict=True)
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True)
class State:
    """Everything that resume needs besides tensors. `position` is the whole data state."""

    step: int
    position: int
    tokens_seen: int
    tokens_selected: int
    dataset: str
    settings: dict[str, Any]


def save(
    folder: Path, live: Live, tokenizer: Any, optimizer: torch.optim.Optimizer | None, state: State, ranks: Ranks
) -> None:
    """Write a checkpoint to `folder`; every rank must call, the first one writes."""
    weights = get_model_state_dict(live, options=WHOLE)
    moments: Any = get_optimizer_state_dict(live, optimizer, options=WHOLE).get("state", {}) if optimizer else {}
    if ranks.first:
        partial = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        # Gathering copies a tied weight under each of its names; a Hugging Face folder holds it once.
        once = {name for name, _ in live.model.named_parameters()}
        tied = {name for name, _ in live.model.named_parameters(remove_duplicate=False)} - once
        inner = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        live.model.save_pretrained(partial, state_dict={name: inner[name] for name in inner if name not in tied})
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if optimizer:
            flat = {f"{name}|{key}": moment[key] for name, moment in moments.items() for key in MOMENTS}
            save_file({name: torch.as_tensor(tensor).contiguous().clone() for name, tensor in flat.items()},
                      partial / "optimizer.safetensors")  # fmt: skip
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=1))
        _publish(partial, folder)
    ranks.wait()


def load_optimizer(folder: Path, live: Live, optimizer: torch.optim.Optimizer) -> None:
    """Restore the moments, whatever number of ranks they were saved on."""
    state: dict[str, Any] = {}
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        parameter, key = name.rsplit("|", 1)
        state.setdefault(parameter, {})[key] = tensor
    # Hyper-parameters come from the config; only the moments are state.
    groups: Any = get_optimizer_state_dict(live, optimizer, options=EVERY_RANK)["param_groups"]
    set_optimizer_state_dict(live, optimizer, {"state": state, "param_groups": groups}, options=EVERY_RANK)


def load_state(folder: Path) -> State:
    """The state of a checkpoint."""
    return State(**json.loads((folder / "state.json").read_text()))


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below `folder`, or None."""
    found = sorted(path for path in folder.glob("step-*") if (path / "state.json").exists())
    return found[-1] if found else None


def prune(folder: Path, keep: int, ranks: Ranks) -> None:
    """Delete all but the newest `keep` checkpoints."""
    if ranks.first:
        for path in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(path)


def refuse_changes(folder: Path, stored: State, dataset: str, settings: dict[str, Any]) -> None:
    """Raise UserError naming each setting that differs from the checkpoint's (law 3's twin for stage 2)."""
    lines = [
        f"train.{key}: {stored.settings.get(key)!r} in the checkpoint, {value!r} now"
        for key, value in settings.items()
        if stored.settings.get(key) != value
    ]
    if stored.dataset != dataset:
        lines.append(f"scores: dataset {stored.dataset} in the checkpoint, {dataset} now")
    if lines:
        raise UserError(
            f"{folder}: cannot resume with other settings; restore them or give a new train.output:\n  "
            + "\n  ".join(lines)
        )


def _publish(partial: Path, folder: Path) -> None:
    for path in partial.iterdir():
        fsync_file(path)
    fsync_folder(partial)
    if folder.exists():  # only a finished run's `final` is ever replaced
        shutil.rmtree(folder)
    partial.rename(folder)
    fsync_folder(folder.parent)
