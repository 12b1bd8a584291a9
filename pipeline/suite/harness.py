"""One model through a suite: lm-eval asks and counts, our `open_model` or vLLM answers."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.evaluation.generate import load_by_vllm
from pipeline.suite.data import fetched
from pipeline.suite.suites import DEMO, FOLDERS, Column, Suite
from pipeline.suite.tasks import TASKS, unavailable
from schemas.config import Config
from schemas.errors import UserError, first_line
from schemas.models import open_model, open_tokenizer, positions

SEED = 1234  # lm-eval's own, of the shots that it draws
WINDOW = 2048  # tokens of a prompt and its answer, about: how many share a forward
BACKENDS = ("hf", "vllm")
BOOTSTRAP = 100  # samples, of the standard errors that have no formula
Figure = dict[str, float]


def evaluate_suite(
    config: Config,
    folder: Path,
    suite: Suite,
    backend: str = "hf",
    limit: int | None = None,
    data: Path | None = None,
    new_tokens: int | None = None,
) -> dict[str, Any]:
    """A model's figures: {columns: {title: {value, stderr, rows}}, data: {data set: commit or folder}, how it was run}.

    `limit`: rows of each task. `data`: a folder for the hub's data sets (`pipeline.suite.data`). `new_tokens`: longest
    answer; None: the tasks' own. Raises UserError for a missing package, data set or model.
    """
    evaluator = _harness()
    left_out = {column.title: reason for column in suite.columns if (reason := unavailable(column.task))}
    asked = [column for column in suite.columns if column.title not in left_out]
    with fetched(data, config.eval) as sources, _quiet():
        members = _tasks(asked, new_tokens or (config.eval.new_tokens if suite.name == DEMO.name else None))
    every = {task.task_name: task for tasks in members.values() for task in tasks}
    with _quiet():
        model = _open(folder, backend, config.eval.batch_tokens)
        _refuse_no_room(model, every.values(), folder)
        loaded = {"tasks": every, "groups": {}}
        found = evaluator.evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
    names = {title: [task.task_name for task in tasks] for title, tasks in members.items()}
    return {
        "columns": {column.title: pooled(found, names[column.task], column) for column in asked},
        "left_out": left_out,
        "cut": sum(_cut(model, task) for task in every.values()),
        "suite": suite.name,
        "backend": backend,
        "limit": limit,
        "data": dict(sorted(sources.items())),
        "versions": {name: metadata.version(name) for name in ("lm-eval", "transformers", "torch")},
    }


def pooled(found: dict[str, Any], names: list[str], column: Column) -> Figure:
    """The mean of a column's metric over all rows of its tasks, its standard error and the number of rows."""
    counts = [found["n-samples"][name]["effective"] for name in names]
    total = sum(counts)
    metric, _, kept = column.metric.partition(",")
    values = [found["results"][name][column.metric] for name in names]
    errors = [found["results"][name].get(f"{metric}_stderr,{kept}") for name in names]
    scale = 100.0 if column.percent else 1.0
    figure = {
        "value": scale * sum(value * count for value, count in zip(values, counts, strict=True)) / total,
        "rows": float(total),
    }
    if all(isinstance(error, float) for error in errors):
        pairs = zip(errors, counts, strict=True)
        figure["stderr"] = scale * sum((error * count) ** 2 for error, count in pairs) ** 0.5 / total
    return figure


def _harness() -> Any:
    """lm-eval's evaluator. Raises UserError where it is not installed."""
    try:
        from lm_eval import evaluator
    except ImportError as error:
        raise UserError(
            f"--suite: lm-eval cannot be imported ({first_line(error)})", "pip install 'tokensift[eval]'"
        ) from error
    return evaluator


def _tasks(columns: Sequence[Column], new_tokens: int | None) -> dict[str, list[Any]]:
    """The tasks of each of the columns' names: their rows loaded, their shots and their longest answers set."""
    from lm_eval import tasks
    from lm_eval.tasks import TaskManager

    root = Path(tasks.__file__).parent
    manager = TaskManager(include_path=[str(root / name) for name in FOLDERS], include_defaults=False)
    members: dict[str, list[Any]] = {}
    for column in columns:
        members[column.task] = list(manager.load([deepcopy(TASKS.get(column.task, column.task))])["tasks"].values())
        for task in members[column.task]:
            task.set_config(key="num_fewshot", value=column.shots)
            task.set_fewshot_seed(seed=SEED)
            if new_tokens and task.OUTPUT_TYPE == "generate_until":
                task.set_config(key="generation_kwargs", value={"max_gen_toks": new_tokens}, update=True)
    return members


def _refuse_no_room(model: Any, tasks: Iterable[Any], folder: Path) -> None:
    """Raise UserError for a model whose positions an answer alone would fill."""
    longest = max((_answer(model, task) for task in tasks), default=0)
    if longest >= model.max_length:
        raise UserError(
            f"model: {folder} has {model.max_length} positions, and answers of this suite may take {longest} tokens",
            "evaluate a model of more positions, or with another suite",
        )


def _answer(model: Any, task: Any) -> int:
    """Most tokens of an answer to a task; 0 where answers are given."""
    if task.OUTPUT_TYPE != "generate_until":
        return 0
    return int((task.config.generation_kwargs or {}).get("max_gen_toks", model.max_gen_toks))


def _cut(model: Any, task: Any) -> int:
    """Prompts that lost their beginning, since model and harness had no room for them and an answer."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return 0  # read piece by piece
    room = model.max_length - _answer(model, task)
    answered = task.OUTPUT_TYPE != "generate_until"
    texts = ["".join(one.arguments[: 1 + answered]) for one in task.instances]
    return sum(len(model.tok_encode(text)) > room for text in texts)


def _open(folder: Path, backend: str, batch_tokens: int) -> Any:
    """The model as lm-eval calls it. Raises UserError for a folder that is none, and where vLLM is not installed."""
    if backend == "vllm":
        return _open_vllm(folder)
    from lm_eval.models import huggingface

    device = "cuda" if torch.cuda.is_available() else "cpu"
    window = min(positions(folder, "model") or WINDOW, WINDOW)
    opened = open_model(folder, "model", window, dtype=_dtype(), device=device)
    tokenizer = open_tokenizer(folder, "model")
    wrapped: Any = huggingface.HFLM
    return wrapped(pretrained=opened.module, tokenizer=tokenizer, batch_size=max(1, batch_tokens // WINDOW))


def _open_vllm(folder: Path) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    longest = min(positions(folder, "model") or 2 * WINDOW, 2 * WINDOW)
    return load_by_vllm(_import_wrapper, folder, str(_dtype()).removeprefix("torch."), longest)


def _import_wrapper() -> Any:
    with _named_for_cpus():
        from lm_eval.models import vllm_causallms
    return vllm_causallms.VLLM


@contextmanager
def _named_for_cpus() -> Iterator[None]:
    """lm-eval asks for the version of a package `vllm`; built for CPUs it is the package `vllm-cpu`."""
    asked = metadata.version

    def version(name: str) -> str:
        try:
            return asked(name)
        except metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{asked('vllm-cpu')}+cpu"

    metadata.version = version
    try:
        yield
    finally:
        metadata.version = asked


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of what is meant so: custom data, a model that is open already."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
