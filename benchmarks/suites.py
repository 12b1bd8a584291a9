"""A suite's numbers beside lm-eval's own command: three of its tasks, one model, the same rows.

    python -m benchmarks.suites --model runs/smollm2
    .venv-vllm/bin/python -m benchmarks.suites --model runs/smollm2 --backend vllm --harness .venv/bin/python

Rows are word problems made here, in the columns of ARC (ranked answers), ASDiv (the likelihood of an answer) and GSM8K
(eight worked examples, then a generated solution). Prints, task by task: our harness, `lm_eval run` on the model's folder,
and whether they are equal.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from pipeline.suite.harness import evaluate_suite
from pipeline.suite.suites import Column, Suite
from pipeline.suite.tasks import TASKS
from schemas.config import load_config

ROUNDING = 1e-4  # of a perplexity: float32 products in another order
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells")
FILES = {"arc_easy": "arc/arc_easy.yaml", "asdiv": "asdiv/default.yaml", "gsm8k_cot": "gsm8k/gsm8k-cot.yaml"}
COLUMNS = (
    Column("ranked, acc", "arc_easy", "acc,none", 0),
    Column("ranked, acc_norm", "arc_easy", "acc_norm,none", 0),
    Column("likelihood, greedy", "asdiv", "acc,none", 0),
    Column("likelihood, perplexity", "asdiv", "perplexity,none", 0, percent=False),
    Column("generated, last number", "gsm8k_cot", "exact_match,flexible-extract", 8),
    Column("generated, said", "gsm8k_cot", "exact_match,strict-match", 8),
)


def problems(count: int) -> list[dict[str, Any]]:
    """Sums and differences in words, with the answer and three near it."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        name, thing, first, second = (
            draw.choice(NAMES),
            draw.choice(THINGS),
            draw.randrange(5, 30),
            draw.randrange(1, 5),
        )
        more = draw.random() < 0.5
        answer = first + second if more else first - second
        body = f"{name} has {first} {thing} and {'finds' if more else 'loses'} {second} more."
        body = body if more else body.replace(" more.", " of them.")
        choices = [answer, answer + 1, answer + 2, answer - 1]
        draw.shuffle(choices)
        question = f"How many {thing} does {name} have now?"
        found.append({"body": body, "question": question, "thing": thing, "answer": answer, "choices": choices})
    return found


def rows_of(task: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The problems in the columns of a task's data set."""
    if task == "arc_easy":
        return [
            {
                "question": f"{one['body']} {one['question']}",
                "choices": {"text": [str(choice) for choice in one["choices"]], "label": list("ABCD")},
                "answerKey": "ABCD"[one["choices"].index(one["answer"])],
            }
            for one in found
        ]
    if task == "asdiv":
        return [
            {"body": one["body"], "question": one["question"], "answer": f"{one['answer']} ({one['thing']})"}
            for one in found
        ]
    return [{"question": f"{one['body']} {one['question']}", "answer": f"#### {one['answer']}"} for one in found]


def described(folder: Path, found: list[dict[str, Any]], new_tokens: int) -> Path:
    """The tasks as files that lm-eval reads: its own, with our rows for theirs."""
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(tasks.__file__).parent
    for task, file in FILES.items():
        rows = folder / f"{task}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(task, found)))
        raw = load_yaml(root / file, resolve_func=False)
        split = raw.get("test_split") or raw["validation_split"]
        raw |= {
            "task": f"own_{task}", "dataset_path": "json", "dataset_name": None, "tag": None,
            "dataset_kwargs": {"data_files": {split: str(rows)}}, "training_split": None,
            "validation_split": None if raw.get("test_split") else split,
            "num_fewshot": next(column.shots for column in COLUMNS if column.task == task),
        }  # fmt: skip
        if task == "asdiv":  # beside whether an answer is the likeliest text: how likely it is
            measure = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
            raw["metric_list"] = [*raw["metric_list"], measure]
        if "generation_kwargs" in raw:
            raw["generation_kwargs"]["max_gen_toks"] = new_tokens
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(raw))
        TASKS[task] = raw
    return folder


def alone(model: Path, folder: Path, python: str) -> dict[str, Any]:
    """Results of `lm_eval run` on these tasks in a process of its own, in float32."""
    out = folder / "out"
    subprocess.run(
        [python, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32",
         "--include_path", str(folder), "--tasks", ",".join(f"own_{task}" for task in FILES), "--device", "cpu",
         "--batch_size", "8", "--output_path", str(out)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return json.loads(next(out.rglob("results_*.json")).read_text())["results"]


def main(
    model: Annotated[Path, typer.Option(help="A model's folder.")],
    backend: Annotated[str, typer.Option(help="Ours: hf or vllm.")] = "hf",
    harness: Annotated[str, typer.Option(help="The Python that `lm_eval run` is run by.")] = sys.executable,
    rows: Annotated[int, typer.Option(help="Problems of each task.")] = 40,
    new_tokens: Annotated[int, typer.Option(help="Longest solution.")] = 48,
) -> None:
    """Print both and their difference; exits with 1 where they differ."""
    with tempfile.TemporaryDirectory() as name:
        folder = described(Path(name), problems(rows), new_tokens)
        started = time.monotonic()
        config = load_config(Path(__file__).resolve().parents[1] / "configs" / "demo.yaml")
        ours = evaluate_suite(config, model, Suite("three", COLUMNS, {}), backend)["columns"]
        between = time.monotonic()
        theirs = alone(model, folder, harness)
        print(
            f"{rows} rows of each task; ours ({backend}) {between - started:.0f} s, lm_eval {time.monotonic() - between:.0f} s"
        )
    different = 0
    for column in COLUMNS:
        one, other = (
            ours[column.title]["value"],
            theirs[f"own_{column.task}"][column.metric] * (100 if column.percent else 1),
        )
        equal = abs(one - other) <= (1e-9 if column.percent else ROUNDING * other)
        different += not equal
        print(f"{column.title:24} {one:12.5f} {other:12.5f}  {'equal' if equal else 'DIFFERENT'}")
    raise typer.Exit(int(different > 0))


if __name__ == "__main__":
    typer.run(main)
