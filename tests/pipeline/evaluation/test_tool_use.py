"""Answers with a Python tool: a scripted model, the real sandbox, and what the paper's harness would have made of both."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.evaluate import Asking, evaluate_models, on_problems, tool_match
from pipeline.evaluation.sandbox import MIB, Sandbox
from pipeline.evaluation.tool_use import Answer, program_of, solve
from pipeline.report.build import accuracy_section
from schemas.config import Config
from schemas.errors import UserError


class Scripted:
    """A model that says what was written for it: to each question a list of texts, one a round, cut at stop strings."""

    def __init__(self, script: dict[str, list[str]]):
        self.script = script
        self.asked: list[list[str]] = []

    def complete(self, prompts: list[str], stop: list[str], new_tokens: int) -> list[str]:
        self.asked.append(prompts)
        texts = []
        for prompt in prompts:
            question = next(question for question in self.script if prompt.startswith(question))
            text = self.script[question][prompt.count("```output\n")]
            texts.append(text[: min([place for mark in stop if (place := text.find(mark)) >= 0] or [len(text)])])
        return texts


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(30, memory=512 * MIB)
    except UserError as error:
        pytest.skip(str(error))


def block(code: str, after: str = "") -> str:
    """A model's words that end in a program, and what it would make up if it were not stopped."""
    return f"```python\n{code}\n```\n```output\n{after or 'made up'}\n```\nThe answer is 0."


def one(sandbox: Sandbox, *texts: str, rounds: int = 4) -> Answer:
    return solve(Scripted({"Q": list(texts)}), sandbox, ["Q"], 100, rounds)[0]


def test_an_answer_is_words_programs_and_what_they_really_printed_in_toras_format(sandbox: Sandbox) -> None:
    answer = one(sandbox, " Count.\n" + block("print(sum(range(5)))"), "So it is $\\boxed{10}$.")
    assert answer.text == " Count.\n```python\nprint(sum(range(5)))\n```\n```output\n10\n```\nSo it is $\\boxed{10}$."
    assert (answer.final(), answer.rounds, answer.ran()) == ("10", 2, True)


def test_each_program_stands_alone_as_in_tora(sandbox: Sandbox) -> None:
    answer = one(sandbox, block("x = 3\nprint(x)"), block("print(x)"), "The answer is 3.")
    assert answer.shown == ["3", "NameError: name 'x' is not defined"]
    assert (answer.final(), answer.rounds, answer.ran()) == ("3", 3, False)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("print(1 / 0)", "ZeroDivisionError: division by zero"),
        ("print('before')\nraise ValueError('why')", "ValueError: why"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("x = 1", "Done"),
        ("print('a')\nprint('b')", "a\nb"),
        ("import os\nos._exit(3)", "Error: exit 3"),
        ("open('/etc/passwd')", "FileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd'"),
        ("import os\nos.fork()", "OSError: [Errno 38] Function not implemented"),
        ("print('y' * 1000)", "y" * 200 + "..." + "y" * 200),
    ],
)
def test_the_model_is_told_what_was_printed_or_the_last_line_of_the_error(
    sandbox: Sandbox, code: str, told: str
) -> None:
    assert one(sandbox, block(code), "Well.").shown == [told]


def test_a_program_without_end_is_a_timeout_to_the_model(sandbox: Sandbox) -> None:
    answer = one(Sandbox(0.5), block("import time\ntime.sleep(100)"), "The answer is 5.")
    assert (answer.shown, answer.final(), answer.ran()) == (["Timeout Error"], "5", False)


def test_the_model_writes_so_many_times_and_no_more(sandbox: Sandbox) -> None:
    model = Scripted({"Q": [block(f"print({number})") for number in range(9)]})
    answer = solve(model, sandbox, ["Q"], 100, rounds=3)[0]
    assert (len(model.asked), answer.rounds, answer.shown) == (3, 3, ["0", "1", "2"])
    assert answer.final() == "2"  # its words hold no answer: what it saw last does


def test_answers_go_on_by_themselves_and_only_where_there_was_a_program(sandbox: Sandbox) -> None:
    model = Scripted(
        {
            "A": ["The answer is 1."],
            "B": [block("print(2)"), "It is 2."],
            "C": [block("print(3)"), block("print(4)"), "\\boxed{4}"],
            "D": ["\\boxed{5}\n```python\nprint(6)\n```\n```output\n"],  # boxed: it is final
            "E": ["```python\nprint(7)"],  # cut before its end: no program
        }
    )
    answers = solve(model, sandbox, list("ABCDE"), 100)
    assert [answer.rounds for answer in answers] == [1, 2, 3, 1, 1]
    assert [len(prompts) for prompts in model.asked] == [5, 2, 1]
    assert [answer.final() for answer in answers[:4]] == ["1", "2", "4", "5"]
    assert [answer.ran() for answer in answers] == [False, True, True, False, False]
    alone = [solve(model, sandbox, [name], 100)[0].text for name in "ABCDE"]
    assert [answer.text for answer in answers] == alone


@pytest.mark.parametrize(
    ("said", "program"),
    [
        ("text\n```python\na\n```", "a\n"),
        ("```python\na\n```\nmore\n```python\nb\nc\n```", "b\nc\n"),
        ("```python\na\n```\nthen words", None),
        ("```\na\n```", None),
        ("```python\na", None),
        ("```python\na\n```python\nb\n```", "b\n"),
        ("so \\boxed{1} ```python\na\n```", None),
        ("", None),
    ],
)
def test_a_program_is_the_last_closed_block_at_the_end_of_words_that_call_no_answer_final(
    said: str, program: str | None
) -> None:
    assert program_of(said) == program


def test_the_figures_count_right_answers_programs_that_ran_and_rounds(
    sandbox: Sandbox, scores: Config, tmp_path: Path
) -> None:
    model = Scripted(
        {
            "A": ["The answer is 1/2.\nProblem: another"],
            "B": [block("print(2)"), "It is 2."],
            "C": [block("print(1 / 0)"), "It is 9."],
            "D": [block("print(4)"), block("print(4)"), block("print(4)"), block("print(4)"), ""],
        }
    )
    golds = {"A": "0.5", "B": "2", "C": "3", "D": "4"}
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"prompt": name, "answer": gold}) + "\n" for name, gold in golds.items()))
    config = scores.model_copy(update={"eval": scores.eval.model_copy(update={"problems": path})})
    found = tool_match(model, sandbox, config, 4)
    assert found == {"tool_match": 0.75, "tool_problems": 4, "tool_ran": 0.5, "tool_rounds": 9 / 4}
    row = {"model": "m", "exact_match": 0.25, "problems": 4, **found}
    columns, cells = on_problems([row, {"model": "n"}])
    assert columns[1] == "with Python"
    assert [line[1] for line in cells] == ["75.0%, ran 50%, 2.2 rounds", "-"]
    assert "with Python" not in on_problems([{"model": "n"}])[0]
    (tmp_path / "evaluation.json").write_text(json.dumps([row]))
    assert "75.0%, ran 50%, 2.2 rounds" in str(accuracy_section(tmp_path / "evaluation.json"))


def test_a_real_model_is_asked_with_the_tool_and_its_figures_lie_beside_the_others(
    sandbox: Sandbox, scores: Config, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "The sum of", "answer": "3"}\n')
    raw: dict[str, Any] = {"problems": path, "new_tokens": 4, "target": None, "choices": None}
    config = scores.model_copy(update={"eval": scores.eval.model_copy(update=raw)})
    (row,) = evaluate_models(config, [str(tiny_model)], show=False, asking=Asking(tool=True))
    assert (row["tool_problems"], row["tool_rounds"], row["tool_ran"]) == (1, 1, 0)
    assert row["tool_match"] == row["exact_match"]  # it wrote no program, so the answer is the same


def test_the_tool_without_problems_or_without_a_sandbox_is_refused_before_a_model_is_opened(
    scores: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "p").write_text("")
    without = scores.model_copy(update={"eval": scores.eval.model_copy(update={"target": tmp_path / "p"})})
    with pytest.raises(UserError, match=r"eval\.problems"):
        evaluate_models(without, ["no such model"], asking=Asking(tool=True))
    config = scores.model_copy(update={"eval": scores.eval.model_copy(update={"problems": tmp_path / "p"})})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="bubblewrap"):
        evaluate_models(config, ["no such model"], asking=Asking(tool=True))
