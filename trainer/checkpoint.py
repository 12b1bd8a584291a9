"""Checkpoints: a folder of the ranks' own rows, published by one rename, readable on any number of ranks.

`rank-*.safetensors` hold weights and moments (`trainer.parts`); config and tokenizer lie beside them, so that
`trainer.export` needs nothing else to make a Hugging Face folder. Nothing is pickled. `state.json` is sealed, and holds
a hash of every file beside it. Checkpoints lie on a file system that all ranks share.
"""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from schemas.errors import UserError, first_line
from schemas.fingerprint import difference
from schemas.seal import seal, unseal
from schemas.store import TEMPORARY_PREFIX, fsync_file, fsync_folder
from trainer.parts import hash_file
from trainer.ranks import Ranks

STATE, PARTS = "state.json", "rank-*.safetensors"
CARD = "README.md"  # of a model folder; whoever publishes it goes on writing there, so that its bytes are not held
FORMAT = 2  # 1: whole, `model.safetensors` and `optimizer.safetensors`
FIX = "delete this checkpoint; training goes on from the one before it"


@dataclass(frozen=True, slots=True)
class State:
    """Everything that resume needs besides tensors. `position` is the whole data state.

    `origin` is all that decides the numbers: base, dataset, tokenizer, context, settings, versions. `norms`: gradient norms
    of the last steps, which outliers are held against. `names`: what base, reference and corpus are known as, for
    people; they decide nothing.
    """

    step: int
    position: int
    tokens_seen: int
    tokens_selected: int
    origin: dict[str, Any]
    norms: list[float] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


def folder_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies below the run's `folder` of them."""
    return folder / f"step-{step:07d}"


def partial_of(folder: Path) -> Path:
    """Where a folder is written before it has its name."""
    return folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")


def describe(partial: Path, model: Any, tokenizer: Any) -> None:
    """Write config and tokenizer."""
    model.config.save_pretrained(partial)
    if model.can_generate():
        model.generation_config.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)


def publish(partial: Path, folder: Path, state: State, files: dict[str, str], renamed: bool) -> None:
    """Seal a written folder, and give it its name once every byte and every name below it is on the disk.

    `files`: hashes of those that are known and durable. `renamed`: the model's tensors have other names in memory than
    in its family's files.
    """
    others = [name for name in _files(partial) if name not in files]
    files = files | {name: hash_file(partial / name) for name in others}
    sealed = {"format": FORMAT, "state": asdict(state), "files": files, "renamed": renamed}
    (partial / STATE).write_bytes(seal(sealed))
    for name in (*others, STATE, *([CARD] if (partial / CARD).exists() else [])):
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
    """Names of the files below a checkpoint, relative to it, sorted; without its card."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in found if name != CARD]


def load_state(folder: Path, ranks: Ranks | None = None) -> State:
    """The state of a checkpoint whose every file is as it was written; ranks share the reading.

    Raises UserError, on every rank, naming a file that is not.
    """
    content = read_sealed(folder)
    found = _problem(folder, content["files"], ranks.rank if ranks else 0, ranks.world if ranks else 1)
    for problem in ranks.every(found) if ranks else [found]:
        if problem:
            raise UserError(*problem)
    return State(**content["state"])


def read_sealed(folder: Path) -> dict[str, Any]:
    """What `state.json` says, `files` and `renamed` too. Raises UserError if it is damaged or of another format."""
    path = folder / STATE
    try:
        content = unseal(path.read_bytes())
        State(**content["state"])
        dict(content["files"])
        number = content.get("format", 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, or of another version of tokensift ({first_line(error)})", FIX) from error
    if number != FORMAT:
        fix = "finish the run with the release that began it, or give the run another name (train.run)"
        raise UserError(f"{path}: of format {number}; this release reads {FORMAT}", fix)
    return content


def _problem(folder: Path, files: dict[str, str], rank: int, world: int) -> tuple[str, str] | None:
    """What is wrong with a checkpoint's files, the way on with it; a rank hashes its share of them."""
    present = {*_files(folder)} - {STATE}
    for number, name in enumerate(sorted(files.keys() | present)):
        if name not in present:
            return f"{folder / name}: missing", FIX
        if name not in files:
            return f"{folder / name}: not one of the checkpoint's own files", "move it elsewhere"
        if number % world == rank and hash_file(folder / name) != files[name]:
            return f"{folder / name}: not the bytes that were written", FIX
    return None


def newest(folder: Path) -> Path | None:
    """The newest published checkpoint below `folder`, or None."""
    found = sorted(path for path in folder.glob("step-*") if path.is_dir())
    return found[-1] if found else None


def prune(folder: Path, keep: int, every: int) -> None:
    """Delete all but the newest `keep` checkpoints and those of steps that `every` divides, and what is half written."""
    passing = [path for path in sorted(folder.glob("step-*")) if not every or int(path.name[5:]) % every]
    for path in passing[:-keep]:
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
