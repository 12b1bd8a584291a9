"""Task descriptions of ours, where lm-eval has none that asks as the paper's harness did (ZubinGou/math-evaluation-harness).

Word problems go after the eight worked examples of Wei et al. (2022), MATH after Minerva's four (Lewkowycz et al., 2022),
MMLU-STEM and SAT after these four with choices; greedy, at most 1024 tokens, ended by the next "Question:" or "Problem:".
The examples' text is read from lm-eval's own files. Minerva's stand there as published; the paper's harness has doubled
backslashes in three of them. MathQA's four are the first of its train split: those of the paper's harness are its own.
Answers are graded by value (`pipeline.evaluation.grading`), choices by their letter, programs by their tests in the sandbox.
"""

import ast
import re
import secrets
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.evaluation.grading import final_answer, same_answer
from pipeline.evaluation.sandbox import Sandbox
from schemas.errors import UserError, first_line

DEMO = "tokensift/demo"
MATH_TASKS = "HuggingFaceTB/math_tasks"  # the paper's harness's own files
NEW_TOKENS, PROGRAM_TOKENS = 1024, 512
PROGRAM_SECONDS = 5.0
PROGRAMS = ("paper_mbpp", "paper_humaneval")
Row = dict[str, Any]
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {{text}} Your code should pass these tests:\n\n"
    "{{test_list | join('\n')}}\n[BEGIN]\n"
)
ASKED = "What of the following is the right choice? Explain your answer."
STEM = frozenset(
    [
        "abstract_algebra",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ]
)
# The choices that the paper's harness adds to Minerva's examples, and the right one.
CHOICES = (
    ("[-5,-2)", "[2,5)", "[-2,-5)", "[5,2)", "B"),
    ("14", "4", "2", "24", "D"),
    ("12", "20", "16", "15", "C"),
    (r"$-\frac{2}{3}$", r"$\frac{2}{3}$", r"$\frac{1}{3}$", r"$\frac{4}{9}$", "A"),
)


def wei() -> list[Row]:
    """Eight word problems with worked answers, as lm-eval's `gsm8k_cot` has them."""
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    file = Path(tasks.__file__).parent / "gsm8k" / "gsm8k-cot.yaml"
    return load_yaml(file, resolve_func=False)["fewshot_config"]["samples"]


def minerva() -> list[Row]:
    """Minerva's four problems, as lm-eval's `leaderboard` tasks have them: its `minerva_math` asks for an older antlr4."""
    from lm_eval.tasks.leaderboard.math.utils import list_fewshot_samples

    return [{"question": row["problem"], "target": row["solution"]} for row in list_fewshot_samples()]


def chosen() -> list[Row]:
    """Minerva's four with choices; their answers end in a letter."""
    return [
        {
            "question": with_choices(row["question"], choices[:-1]),
            "target": f"{row['target'].split('Final Answer:')[0]}Final Answer: The final answer is ({choices[-1]}).",
        }
        for row, choices in zip(minerva(), CHOICES, strict=True)
    ]


def with_choices(question: str, choices: Any) -> str:
    """A question and its lettered choices."""
    lettered = ", ".join(f"({letter}) {str(choice).strip()}" for letter, choice in zip("ABCDE", choices, strict=False))
    return f"{question.strip()}\n{ASKED}\n{lettered}"


def choice_of(text: str) -> str:
    """The letter that a completion says the answer is, empty if it says none."""
    found = re.search(r"(?:answer|choice) is \(?([A-E])\b", text, re.IGNORECASE)
    return found.group(1).upper() if found else ""


def by_value(row: Row, results: list[str]) -> dict[str, float]:
    """1 if a completion's answer is worth what the row's target is."""
    return {"exact_match": float(same_answer(final_answer(results[0]), row["target"]))}


def by_letter(row: Row, results: list[str]) -> dict[str, float]:
    """1 if a completion chooses the row's letter."""
    return {"exact_match": float(choice_of(results[0]) == row["target"])}


@lru_cache(maxsize=1)
def sandbox() -> Sandbox:
    """Where programs run. Raises UserError where nothing is safe."""
    return Sandbox(seconds=PROGRAM_SECONDS)


def by_tests(program: str) -> dict[str, float]:
    """1 if a program with its tests comes to its end, and not by leaving before they are run."""
    last = secrets.token_hex(8)
    outcome = sandbox().run(f"{program}\nprint({last!r})")
    return {"pass_at_1": float(outcome.ok and outcome.stdout.rstrip().endswith(last))}


def _mbpp(row: Row, results: list[str]) -> dict[str, float]:
    return by_tests("\n".join([row["test_setup_code"] or "", results[0], *row["test_list"]]))


def _humaneval(row: Row, results: list[str]) -> dict[str, float]:
    return by_tests(f"{row['prompt']}{results[0]}\n{row['test']}\ncheck({row['entry_point']})\n")


def _canonical(rows: Any) -> Any:
    """MBPP's tasks 2, 3 and 4: the worked examples of Austin et al. (2021)."""
    return rows.filter(lambda row: row["task_id"] in (2, 3, 4))


# Rows of the data sets as {question, target}; each function takes one row, and gives None for one that is left out.


def _gsm8k(row: Row) -> Row:
    return {"question": row["question"], "target": row["answer"].split("####")[1].strip()}


def _math(row: Row) -> Row:
    return {"question": row["problem"], "target": f"${row['answer']}$"}


def _svamp(row: Row) -> Row:
    body = row["Body"].strip()
    return {"question": f"{body}{'' if body.endswith('.') else '.'} {row['Question'].strip()}", "target": row["Answer"]}


def _asdiv(row: Row) -> Row | None:
    if ";" in row["answer"]:  # several answers; the paper's harness leaves these out too
        return None
    target = re.sub(r"\(.*?\)", "", row["answer"]).strip()
    return {"question": said_how(f"{row['body'].strip()} {row['question'].strip()}", target), "target": target}


def _mawps(row: Row) -> Row:
    return {"question": row["input"].strip(), "target": str(row["target"])}


def _tabmwp(row: Row) -> Row:
    about = f'regarding "{row["table_title"]}" ' if row["table_title"] else ""
    question = f"Read the following table {about}and answer a question:\n{row['table']}\n{row['question']}"
    if row["choices"]:
        question += f" Please select from the following options: {row['choices']}"
    return {"question": said_how(question, row["answer"]), "target": row["answer"]}


def _mathqa(row: Row) -> Row:
    options = row["options"].strip()
    listed = ast.literal_eval(options) if options.startswith("[") else re.split(r"\s*,\s*(?=[a-e] \) )", options)
    choices = [re.sub(r"^(?:[a-e] \) )+", "", option) for option in listed]
    problem = row["Problem"].strip()
    letter = row["correct"].upper()
    worked = f"{row['Rationale'].strip().strip(chr(34)).strip()}\nFinal Answer: The final answer is ({letter})."
    return {"question": with_choices(problem[:1].upper() + problem[1:], choices), "target": letter, "worked": worked}


def _stem(row: Row) -> Row | None:
    if row["subject"] not in STEM:
        return None
    return {"question": with_choices(row["question"], row["choices"]), "target": "ABCD"[row["answer"]]}


def _sat(row: Row) -> Row:
    options = re.sub(r" ([BCD])\) ", r" (\1) ", f"({row['options'].strip()}")
    return {"question": f"{row['question'].strip()}\n{ASKED}\n{options}", "target": row["Answer"].strip()}


def said_how(question: str, target: str) -> str:
    """A question that says how it is answered, where that is by a word of two."""
    word = target.strip().lower()
    how = {"yes": "Yes or No", "no": "Yes or No", "true": "True or False", "false": "True or False"}.get(word)
    return f"{question.strip()} ({how})" if how else question.strip()


def svamp(**_: Any) -> Any:
    """Train and test rows together, 1,000 of them: what the paper's harness asks."""
    import datasets

    parts = datasets.load_dataset("ChilleD/SVAMP")
    return datasets.DatasetDict({"test": datasets.concatenate_datasets([parts["train"], parts["test"]])})


def each(read: Callable[[Row], Row | None]) -> Callable[[Any], Any]:
    """A data set's rows as {question, target}, for lm-eval's `process_docs`."""

    def process(rows: Any) -> Any:
        from datasets import Dataset

        return Dataset.from_list([read_row for row in rows if (read_row := read(row)) is not None])

    return process


def mathematics(
    name: str, path: str, read: Callable[[Row], Row | None], shots: Callable[[], list[Row]] | None, **more: Any
) -> Row:
    """A task of generated solutions; worked examples in the form "Question: / Answer:" if they are Wei's, else "Problem:"."""
    word = shots is wei
    fewshot = {"sampler": "first_n", "doc_to_target": "{{worked if worked is defined else target}}"}
    return {
        "task": name,
        "dataset_path": path,
        "output_type": "generate_until",
        "test_split": "test",
        "process_docs": each(read),
        "doc_to_text": "Question: {{question}}\nAnswer:" if word else "Problem:\n{{question}}\nSolution:",
        "doc_to_target": "{{target}}",
        "target_delimiter": " " if word else "\n",
        "fewshot_delimiter": "\n\n\n",
        "fewshot_config": fewshot | ({"samples": shots} if shots else {"split": "train"}),
        "generation_kwargs": {
            "until": ["\n\nQuestion:", "\n\nProblem:"],
            "max_gen_toks": NEW_TOKENS,
            "do_sample": False,
        },
        "process_results": by_value if shots in (wei, minerva) else by_letter,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **more,
    }


def programs(name: str, path: str, until: list[str], **more: Any) -> Row:
    """A task of generated Python that must pass its tests."""
    return {
        "task": name,
        "dataset_path": path,
        "output_type": "generate_until",
        "test_split": "test",
        "target_delimiter": "",
        "generation_kwargs": {"until": until, "max_gen_toks": PROGRAM_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "pass_at_1", "aggregation": "mean", "higher_is_better": True}],
        **more,
    }


def demo(name: str, file: str, **more: Any) -> Row:
    """A task on one of the config's held-out files."""
    return {"task": name, "dataset_path": DEMO, "dataset_name": file, "test_split": "test", **more}


def _in_file(file: str) -> Row:
    return {"dataset_kwargs": {"data_files": {"test": f"data/{file}/test.jsonl"}}}


TASKS = {
    task["task"]: task
    for task in (
        mathematics("paper_gsm8k", "openai/gsm8k", _gsm8k, wei, dataset_name="main"),
        mathematics("paper_math500", "HuggingFaceH4/MATH-500", _math, minerva),
        mathematics("paper_svamp", "ChilleD/SVAMP", _svamp, wei, custom_dataset=svamp),
        mathematics("paper_asdiv", "EleutherAI/asdiv", _asdiv, wei, test_split="validation"),
        mathematics("paper_mawps", MATH_TASKS, _mawps, wei, **_in_file("mawps")),
        mathematics("paper_tabmwp", MATH_TASKS, _tabmwp, wei, **_in_file("tabmwp")),
        mathematics("paper_mathqa", "regisss/math_qa", _mathqa, None),
        mathematics("paper_mmlu_stem", "cais/mmlu", _stem, chosen, dataset_name="all"),
        mathematics("paper_sat", MATH_TASKS, _sat, chosen, **_in_file("sat_math")),
        programs(
            "paper_mbpp",
            "google-research-datasets/mbpp",
            ["[DONE]"],
            dataset_name="full",
            doc_to_text=MBPP_PROMPT,
            doc_to_target="{{code}}\n[DONE]",
            fewshot_config={"sampler": "first_n", "split": "prompt", "process_docs": _canonical},
            process_results=_mbpp,
        ),
        programs(
            "paper_humaneval",
            "openai/openai_humaneval",
            ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            doc_to_text="{{prompt}}",
            doc_to_target="{{canonical_solution}}",
            process_results=_humaneval,
        ),
        demo(
            "demo_problems",
            "problems",
            output_type="generate_until",
            doc_to_text="{{prompt}}",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": ["\nProblem:"], "do_sample": False},
            process_results=lambda row, results: by_value({"target": str(row["answer"])}, results),
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        ),
        demo(
            "demo_choices",
            "choices",
            output_type="multiple_choice",
            doc_to_text="{{prompt}}",
            doc_to_choice="{{choices}}",
            doc_to_target="{{right}}",
            target_delimiter="",
            metric_list=[
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        ),
        demo(
            "demo_text",
            "target",
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{prompt}}{{text}}",
            metric_list=[{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        ),
    )
}


def unavailable(task: str) -> str | None:
    """Why a task cannot be run here, or None: programs run in the sandbox or not at all."""
    if task not in PROGRAMS:
        return None
    try:
        sandbox()
    except UserError as error:
        return first_line(error)
    return None
