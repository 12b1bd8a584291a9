"""Where a suite's rows come from: the hub at a pinned revision, a folder that mirrors it, or the config's held-out files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.suite.tasks import DEMO
from schemas.config import Evaluation
from schemas.errors import UserError, first_line

# Commits that others pin too; a data set that is not here is read as it stands, and the commit that it had is recorded.
REVISIONS = {
    "openai/gsm8k": "e53f048856ff4f594e959d75785d2c2d37b678ee",
    "HuggingFaceH4/MATH-500": "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    "ChilleD/SVAMP": "5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef",
    "EleutherAI/asdiv": "8f95807222d87b4c688c3c22a6ba2801e1fa03e2",
    "HuggingFaceTB/math_tasks": "3d34f1076f279000b9315583dcdacfd288898283",
    "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
    "google-research-datasets/mbpp": "4bb6404fdc6cacfda99d4ac4205087b89d32030c",
    "openai/openai_humaneval": "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "aps/super_glue": "3de24cf8022e94f4ee4b9d55a6f539891524d646",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "allenai/winogrande": "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    "allenai/openbookqa": "388097ea7776314e93a529163e0fea805b8a6454",
}


@contextmanager
def fetched(folder: Path | None, held_out: Evaluation) -> Iterator[dict[str, str]]:
    """While this runs, what lm-eval's tasks load comes from where we say; yields what came from where, by data set.

    `folder` mirrors the hub: <organisation>/<name> holds what `hf download --repo-type dataset` puts there, or JSON lines
    <split>.jsonl of the same columns, for one config of it in a folder of the config's name. Raises UserError, naming the
    data set, if it is not there or not to be had.
    """
    import datasets

    sources: dict[str, str] = {}
    load: Any = datasets.load_dataset

    def load_ours(path: str, name: str | None = None, **options: Any) -> Any:
        if path == DEMO:
            files = {"test": str(_held_out(held_out, str(name)))}
            return load("json", data_files=files)
        try:
            if folder is not None:
                sources[path] = str(folder / path)
                return _mirrored(load, folder, path, name, options)
            found = load(path, name, **({"revision": REVISIONS.get(path)} | options))
        except UserError:
            raise
        except Exception as error:  # what the network, the hub's client and Arrow raise has no common base
            where = f"{folder / path}" if folder else f"`{path}`, on the hub"
            raise UserError(
                f"data set {where}: cannot be read ({first_line(error)})",
                "mend the network, or fetch it elsewhere and give its folder with --data",
            ) from error
        sources[path] = REVISIONS.get(path) or _commit(found)
        return found

    datasets.load_dataset = load_ours
    try:
        yield sources
    finally:
        datasets.load_dataset = load


def _mirrored(load: Any, folder: Path, path: str, name: str | None, options: dict[str, Any]) -> Any:
    """A data set of a folder. A README of the hub's says itself where the configs' files are."""
    place = folder / path
    if not place.is_dir():
        raise UserError(
            f"--data: {folder} has no {path}", f"`hf download {path} --repo-type dataset --local-dir {place}`"
        )
    if (place / "README.md").exists() or options:
        return load(str(place), name if (place / "README.md").exists() else None, **options)
    place = place / name if name and (place / name).is_dir() else place
    return load("json", data_files={file.stem: str(file) for file in sorted(place.glob("*.jsonl"))})


def _held_out(held_out: Evaluation, name: str) -> Path:
    """The config's file of that name. Raises UserError if there is none."""
    file: Path | None = getattr(held_out, name)
    if file is None or not file.is_file():
        raise UserError(
            f"eval.{name}: {file or 'missing'}: the demo suite needs it", "run `tokensift data`, or name one"
        )
    return file


def _commit(found: Any) -> str:
    """The commit of the hub's that files were read at, as their URLs say; `unknown` where they do not."""
    urls = [url for part in found.values() for url in (part.info.download_checksums or {})]
    return next((url.split("@", 1)[1].split("/", 1)[0] for url in urls if "@" in url), "unknown")
