"""The suites: which tasks, in the paper's column order, with which shots, and the paper's own rows beside them."""

from dataclasses import dataclass

EXACT = "exact_match,none"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a suite's table.

    task: a task, group or tag of lm-eval's, or one of `pipeline.suite.tasks`. metric: the key of its results, whose mean
    over all rows of all its tasks is the figure. percent: it is a share. note: where it is not as the paper had it.
    """

    title: str
    task: str
    metric: str
    shots: int
    note: str = ""
    percent: bool = True


@dataclass(frozen=True, slots=True)
class Suite:
    """A table: its columns and the paper's rows, in percent; `source` says where these are from."""

    name: str
    columns: tuple[Column, ...]
    rows: dict[str, tuple[float, ...]]
    source: str = ""


GSM8K = Column("GSM8K", "paper_gsm8k", EXACT, 8)
MATH = Column("MATH", "paper_math500", EXACT, 4)
FIRST_ROWS = (
    "shots: the first rows of the train split, for the paper's harness's own examples; all test rows, not 1,000"
)

MATH9 = Suite(
    "math9",
    (
        GSM8K,
        MATH,
        Column("SVAMP", "paper_svamp", EXACT, 8),
        Column("ASDiv", "paper_asdiv", EXACT, 8),
        Column("MAWPS", "paper_mawps", EXACT, 8),
        Column("TAB", "paper_tabmwp", EXACT, 8),
        Column("MQA", "paper_mathqa", EXACT, 4, FIRST_ROWS),
        Column("MMLU-STEM", "paper_mmlu_stem", EXACT, 4),
        Column("SAT", "paper_sat", EXACT, 4),
    ),
    {
        "TinyLlama 1.1B": (2.9, 3.2, 11.0, 18.1, 20.4, 12.5, 14.6, 16.1, 21.9),
        "TinyLlama-CT 1.1B (15B)": (6.4, 2.4, 21.7, 36.7, 47.7, 17.9, 13.9, 23.0, 25.0),
        "Rho-1-Math 1B (15B)": (29.8, 14.0, 49.2, 61.4, 79.8, 25.8, 30.4, 24.7, 28.1),
        "Rho-1-Math 1B (50B)": (36.2, 15.6, 52.1, 67.0, 83.9, 29.0, 32.5, 23.3, 28.1),
        "Mistral 7B": (41.2, 11.6, 64.7, 68.5, 87.5, 52.9, 33.0, 49.5, 59.4),
        "Mistral-CT 7B (15B)": (42.9, 22.2, 68.6, 71.0, 86.1, 45.1, 47.7, 52.6, 65.6),
        "Rho-1-Math 7B (15B)": (66.9, 31.0, 77.8, 79.0, 93.9, 49.9, 58.7, 54.6, 84.4),
        "DeepSeekMath 7B": (64.1, 34.2, 74.0, 83.9, 92.4, 63.4, 62.4, 56.4, 84.4),
    },
    "Rho-1 (arXiv 2404.07965), Table 1; tokens seen in brackets",
)

SHOTS_UNSTATED = "the paper names no shots"
GENERAL15 = Suite(
    "general15",
    (
        Column("MMLU", "mmlu", "acc,none", 5, SHOTS_UNSTATED),
        Column("BBH", "bbh_cot_fewshot", "exact_match,get-answer", 3, SHOTS_UNSTATED),
        MATH,
        GSM8K,
        Column("MBPP", "paper_mbpp", "pass_at_1,none", 3, SHOTS_UNSTATED),
        Column("HumanEval", "paper_humaneval", "pass_at_1,none", 0),
        Column("AGIEval", "agieval_en", "acc,none", 0, SHOTS_UNSTATED),
        Column("ARC-C", "arc_challenge", "acc_norm,none", 0, SHOTS_UNSTATED),
        Column("ARC-E", "arc_easy", "acc_norm,none", 0, SHOTS_UNSTATED),
        Column("BoolQ", "boolq", "acc,none", 0, SHOTS_UNSTATED),
        Column("PIQA", "piqa", "acc_norm,none", 0, SHOTS_UNSTATED),
        Column("HellaSwag", "hellaswag", "acc_norm,none", 0, SHOTS_UNSTATED),
        Column("WinoGrande", "winogrande", "acc,none", 0, SHOTS_UNSTATED),
        Column("OBQA", "openbookqa", "acc_norm,none", 0, SHOTS_UNSTATED),
        Column("TydiQA", "tydiqa_goldp", "f1,none", 1, SHOTS_UNSTATED),
    ),
    {
        "Rho-1 less TinyLlama-CT, 1.1B (80B)": (
            *(11.3, 3.9, 5.0, 28.2, 6.5, 6.9, 1.1, 5.0, 8.6, 11.3, 0.9, 1.4, 0.2, 3.4, 8.9),
        ),
    },
    "Rho-1 (arXiv 2404.07965), Figure 5: it gives differences alone",
)

DEMO = Suite(
    "demo",
    (
        Column("problems", "demo_problems", EXACT, 0),
        Column("choices", "demo_choices", "acc,none", 0),
        Column("choices, norm", "demo_choices", "acc_norm,none", 0),
        Column("bits/byte", "demo_text", "bits_per_byte,none", 0, percent=False),
    ),
    {},
)
SUITES = {suite.name: suite for suite in (MATH9, GENERAL15, DEMO)}
# Folders of lm-eval's own tasks that the suites use: its whole index of 14,000 takes seconds to read.
FOLDERS = (
    *("mmlu/default", "bbh/cot_fewshot", "agieval", "arc", "super_glue/boolq", "piqa", "hellaswag"),
    *("winogrande", "openbookqa", "tydiqa"),
)
