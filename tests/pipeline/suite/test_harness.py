"""Every task of the suites runs on rows in its data set's own columns; lm-eval run by itself gives the same numbers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lm_eval import evaluator
from lm_eval import tasks as harness_tasks
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from pipeline.suite import harness
from pipeline.suite import tasks as suite_tasks
from pipeline.suite.data import REVISIONS, fetched
from pipeline.suite.harness import evaluate_suite
from pipeline.suite.suites import GENERAL15, MATH9, SUITES, Column, Suite
from pipeline.suite.tasks import PROGRAMS, TASKS, unavailable
from schemas.config import Config, Evaluation
from schemas.errors import UserError

# What a model that solved our rows would say, by a word of the question; `general15` shares the first two.
SOLUTIONS = {
    "baker fills": "The answer is 15.",
    "Nadia reads": "She reads 8 * 5 = 40 days. The answer is 1000.",
    r"\frac{3}{4} + \frac{1}{8}": "Final Answer: The final answer is $0.875$. I hope it is correct.",
    "x^2 = 9": r"So $x = \boxed{-3}$.",
    "Omar had": "17 - 5 = 12. The answer is 12 stamps.",
    "shelf holds": "The answer is $23$.",
    "ducks on a pond": "The answer is 12.0.",
    "box heavier": "3 is more than 2. The answer is yes.",
    "Pia picked": "The answer is 8.",
    "rope of 2.5 m": "The answer is 1/2.",
    "more kites": "The answer is 12.",
    "toy was sold": "The answer is kite.",
    "train runs 90": "Final Answer: The final answer is (B).",
    "6 weeks": "6 times 7 is 42. The choice is C",
    "falls freely": "Final Answer: The final answer is (B).",
    "median of": "Final Answer: The final answer is (B).",
    "3x - 2": "Final Answer: The final answer is (C).",
    "slope of": "Final Answer: The final answer is (A).",
}


class Scripted(LM):
    """Says what it is told to whatever is asked last in a prompt."""

    max_length, max_gen_toks = 100_000, 256

    def __init__(self, answer: Callable[[str], str]):
        super().__init__()
        self.answer = answer
        self.prompts: list[str] = []

    def tok_encode(self, text: str) -> list[str]:
        return text.split()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise AssertionError("nothing of this suite is ranked")

    loglikelihood_rolling = loglikelihood  # type: ignore[assignment]


def solved(prompt: str) -> str:
    question = prompt[max(prompt.rfind("Question:"), prompt.rfind("Problem:")) :]
    return next(said for word, said in SOLUTIONS.items() if word in question)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], str]], Scripted]:
    def use(answer: Callable[[str], str]) -> Scripted:
        model = Scripted(answer)
        monkeypatch.setattr(harness, "_open", lambda *_: model)
        return model

    return use


def values(row: dict[str, Any]) -> dict[str, float]:
    return {title: figure["value"] for title, figure in row["columns"].items()}


@pytest.mark.parametrize("suite", [MATH9, GENERAL15], ids=lambda suite: suite.name)
def test_every_task_of_the_papers_tables_runs_on_rows_of_its_data_sets_columns(
    scores: Config, long_model: Path, data: Path, suite: Suite
) -> None:
    row = evaluate_suite(scores, long_model, suite, data=data, limit=1, new_tokens=3)
    ran = {column.title for column in suite.columns if not unavailable(column.task)}
    assert row["columns"].keys() == ran
    assert row["left_out"].keys() == {column.title for column in suite.columns} - ran
    assert all(0 <= figure["value"] <= 100 and figure["rows"] >= 1 for figure in row["columns"].values())
    assert row["cut"] == 0
    if suite is GENERAL15:
        rows = {title: row["columns"][title]["rows"] for title in ("MMLU", "BBH", "AGIEval", "TydiQA")}
        assert rows == {"MMLU": 57, "BBH": 27, "AGIEval": 10, "TydiQA": 9}


def test_right_solutions_count_whatever_their_form_and_wrong_ones_do_not(
    scores: Config, data: Path, script: Callable[[Callable[[str], str]], Scripted]
) -> None:
    script(solved)
    assert values(evaluate_suite(scores, Path(), MATH9, data=data)) == dict.fromkeys(
        [column.title for column in MATH9.columns], 100.0
    )
    script(lambda prompt: "Final Answer: The final answer is (E). The answer is 17.")
    assert values(evaluate_suite(scores, Path(), MATH9, data=data)) == dict.fromkeys(
        [column.title for column in MATH9.columns], 0.0
    )


def test_programs_pass_by_their_tests_and_only_in_the_sandbox(
    scores: Config,
    data: Path,
    script: Callable[[Callable[[str], str]], Scripted],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = replace(GENERAL15, columns=tuple(one for one in GENERAL15.columns if one.task in PROGRAMS))
    if reason := unavailable("paper_mbpp"):
        pytest.skip(reason)
    bodies = {
        "square a number": "def square(n):\n    return n ** 2",
        "reverse a string": "def turned(s):\n    return ''.join(reversed(s))",
        "def triple": "    return n + n + n",
        "def is_even": "    return not n % 2",
    }
    model = script(lambda prompt: next(body for word, body in bodies.items() if word in prompt[-400:]))
    assert values(evaluate_suite(scores, Path(), suite, data=data)) == {"MBPP": 100, "HumanEval": 100}
    mbpp = next(one for one in model.prompts if "reverse a string" in one)
    assert [f"task: Write a function to {what}" in mbpp for what in ("double", "add", "negate", "find")] == [0, 1, 1, 1]
    assert mbpp.endswith(
        "pass these tests:\n\nassert turned('ab') == 'ba'\nassert turned('') == ''\nassert turned('aa') == 'aa'\n[BEGIN]\n"
    )
    script(lambda prompt: "    while True: pass" if "def triple" in prompt else "import os; os._exit(0)")
    assert values(evaluate_suite(scores, Path(), suite, data=data)) == {"MBPP": 0, "HumanEval": 0}

    def no_sandbox() -> None:
        raise UserError("no bubblewrap here", "install it")

    monkeypatch.setattr(suite_tasks, "sandbox", no_sandbox)
    mixed = replace(GENERAL15, columns=tuple(one for one in GENERAL15.columns if one.title in ("GSM8K", "HumanEval")))
    script(solved)
    row = evaluate_suite(scores, Path(), mixed, data=data)
    assert row["columns"].keys() == {"GSM8K"}
    assert "no bubblewrap" in row["left_out"]["HumanEval"]


def test_prompts_are_those_of_the_papers_harness(
    scores: Config, data: Path, script: Callable[[Callable[[str], str]], Scripted]
) -> None:
    model = script(solved)
    evaluate_suite(scores, Path(), MATH9, data=data)
    prompts = {word: next(one for one in model.prompts if word in one[one.rfind("\n\n\n") :]) for word in SOLUTIONS}
    gsm8k = prompts["baker fills"]
    assert gsm8k.startswith("Question: There are 15 trees in the grove.")
    assert gsm8k.count("Question:") == 9
    assert "So there must have been 21 - 15 = 6. The answer is 6.\n\n\nQuestion: If there are 3 cars" in gsm8k
    assert gsm8k.endswith("and sells 9 rolls. How many rolls are left?\nAnswer:")
    math = prompts["x^2 = 9"]
    assert math.startswith("Problem:\nFind the domain of the expression")
    assert math.count("Problem:\n") == 5
    assert "\nSolution:\nWe have that" in math
    assert math.endswith("Problem:\nFind all $x$ with $x^2 = 9$ and $x < 0$.\nSolution:")
    stem = prompts["falls freely"]
    asked = "What of the following is the right choice? Explain your answer.\n"
    assert f"same total weight?\n{asked}(A) 12, (B) 20, (C) 16, (D) 15\nSolution:\nIf Terrell" in stem
    assert "Final Answer: The final answer is (C).\n\n\nProblem:\n" in stem
    assert stem.endswith(f"{asked}(A) Its mass, (B) Its speed, (C) Its height, (D) Its weight\nSolution:")
    assert prompts["3x - 2"].endswith(f"{asked}(A) 2 (B) 3 (C) 4 (D) 5\nSolution:")
    mathqa = prompts["train runs 90"]
    assert mathqa.startswith("Problem:\nA tap fills a tank of 60 litres in 12 minutes . how many")
    assert (
        "(D) 9, (E) none of these\nSolution:\n18 / 2 = 9 answer : d\nFinal Answer: The final answer is (D)." in mathqa
    )
    assert mathqa.endswith("(C) 60 km / h, (D) 1 , 800 km / h, (E) none of these\nSolution:")
    assert prompts["Omar had"].endswith(
        "Question: Omar had 17 stamps and gave 5 to Lena. How many stamps has Omar now?\nAnswer:"
    )
    assert prompts["box heavier"].endswith("Is the box heavier? (Yes or No)\nAnswer:")
    assert prompts["more kites"].endswith(
        'Question: Read the following table regarding "Toys sold" and answer a question:\nToy | Number\nKite | 30\n'
        "Ball | 18\nHow many more kites than balls were sold?\nAnswer:"
    )
    assert prompts["toy was sold"].endswith(" Please select from the following options: ['kite', 'ball']\nAnswer:")
    assert not any("Which are they?" in prompt for prompt in model.prompts)  # of several answers: left out
    assert not any("Who taught Plato?" in prompt for prompt in model.prompts)  # no STEM


LIKELIHOOD = {  # lm-eval's own asdiv, a likelihood
    "task": "likely",
    "dataset_path": "EleutherAI/asdiv",
    "output_type": "loglikelihood",
    "validation_split": "validation",
    "doc_to_text": "{{body}}\nQuestion:{{question}}\nAnswer:",
    "doc_to_target": "{{answer.split(' (')[0]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """lm-eval by itself, on a model that it opened; of its tasks it reads one folder's."""
    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)  # seconds of asking pip

    def run(model: LM, tasks: list[Any], folder: str, **options: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=Path(harness_tasks.__file__).parent / folder, include_defaults=False)
        found = evaluator.simple_evaluate(model, tasks=tasks, task_manager=manager, **options)
        assert found
        return dict(found)

    return run


def test_numbers_are_those_of_the_harness_run_by_itself(
    scores: Config,
    long_model: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    alone: Callable[..., dict[str, Any]],
) -> None:
    monkeypatch.setitem(TASKS, "likely", LIKELIHOOD)
    suite = Suite(
        "three",
        (
            Column("choice", "arc_easy", "acc_norm,none", 0),
            Column("likelihood", "likely", "perplexity,none", 0, percent=False),
            Column("generation", "paper_gsm8k", "exact_match,none", 8),
        ),
        {},
    )
    ours = values(evaluate_suite(scores, long_model, suite, data=data, new_tokens=8))
    plain = HFLM(pretrained=str(long_model), dtype="float32", device="cpu", batch_size=2)
    with fetched(data, Evaluation()):
        gsm8k = TASKS["paper_gsm8k"] | {"num_fewshot": 8}
        gsm8k["generation_kwargs"] = gsm8k["generation_kwargs"] | {"max_gen_toks": 8}
        found = alone(plain, ["arc_easy", LIKELIHOOD, gsm8k], "arc")
    theirs = found["results"]
    assert ours["choice"] == pytest.approx(100 * theirs["arc_easy"]["acc_norm,none"], abs=1e-9)
    assert ours["generation"] == pytest.approx(100 * theirs["paper_gsm8k"]["exact_match,none"], abs=1e-9)
    assert ours["likelihood"] == pytest.approx(theirs["likely"]["perplexity,none"], rel=1e-5)


def test_a_column_of_several_tasks_is_what_the_harness_makes_of_their_group(
    scores: Config, long_model: Path, data: Path, alone: Callable[..., dict[str, Any]]
) -> None:
    suite = replace(GENERAL15, columns=GENERAL15.columns[:1])
    ours = evaluate_suite(scores, long_model, suite, data=data)["columns"]["MMLU"]
    plain = HFLM(pretrained=str(long_model), dtype="float32", device="cpu", batch_size=16)
    with fetched(data, Evaluation()):
        found = alone(plain, ["mmlu"], "mmlu/default", num_fewshot=5)
    assert ours["value"] == pytest.approx(100 * found["groups"]["mmlu"]["acc,none"], abs=1e-9)
    assert ours["stderr"] == pytest.approx(100 * found["groups"]["mmlu"]["acc_stderr,none"], rel=1e-3)


def test_a_model_without_room_for_an_answer_is_refused(scores: Config, tiny_model: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"has 512 positions.*1024 tokens"):
        evaluate_suite(scores, tiny_model, replace(MATH9, columns=MATH9.columns[:1]), data=data)


def test_prompts_that_lose_their_beginning_are_counted(scores: Config, tiny_model: Path, data: Path) -> None:
    suite = replace(MATH9, columns=MATH9.columns[:1])
    assert evaluate_suite(scores, tiny_model, suite, data=data, new_tokens=4)["cut"] == 2


def test_the_demo_suite_runs_on_the_configs_held_out_files(scores: Config, long_model: Path, tmp_path: Path) -> None:
    files = {
        "problems": [{"prompt": "Problem: 1 + 1\nSolution:", "answer": "2"}],
        "choices": [{"prompt": "1 + 1 =", "choices": [" 2", " 3"], "right": 0}] * 2,
        "target": [{"prompt": "Theorem 3.", "text": " For every $x$ there is a $y$."}],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = scores.eval.model_copy(update={name: tmp_path / f"{name}.jsonl" for name in files} | {"new_tokens": 4})
    demo = replace(SUITES["demo"])  # as a task on a cluster gets it: equal, not the same
    row = evaluate_suite(scores.model_copy(update={"eval": held_out}), long_model, demo)
    assert row["columns"].keys() == {"problems", "choices", "choices, norm", "bits/byte"}
    assert row["columns"]["choices"]["value"] in (0, 100)
    assert row["columns"]["bits/byte"]["value"] > 1
    longer = held_out.model_copy(update={"new_tokens": 9000})
    with pytest.raises(UserError, match=r"may take 9000 tokens"):
        evaluate_suite(scores.model_copy(update={"eval": longer}), long_model, demo)
    with pytest.raises(UserError, match=r"eval\.problems.*tokensift data"):
        evaluate_suite(scores, long_model, demo)


def test_a_data_set_that_is_not_there_is_named_with_the_command_that_fetches_it(
    scores: Config, long_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has no openai/gsm8k.*hf download openai/gsm8k --repo-type dataset"):
        evaluate_suite(scores, long_model, MATH9, data=tmp_path)


def test_data_sets_are_asked_of_the_hub_at_their_pinned_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = {}

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        asked[path] = options.get("revision")
        return datasets.DatasetDict({"test": datasets.Dataset.from_list([{"a": 1}])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    with fetched(None, Evaluation()) as sources:
        for path in (*REVISIONS, "hails/agieval-math"):
            datasets.load_dataset(path=path, name=None)
    assert asked == {**REVISIONS, "hails/agieval-math": None}
    assert sources == {**REVISIONS, "hails/agieval-math": "unknown"}
    assert datasets.load_dataset is load
