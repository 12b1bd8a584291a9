"""The config: one YAML file for every verb. Unknown fields are refused, paths are relative to the working folder.

Everything an experiment makes lies below its `root`; `{root}` in any text of the file stands for it, so one override
(`--set root=elsewhere`) moves the whole experiment.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from schemas.errors import UserError, first_line
from schemas.place import AnyPlace, Folder

Dtype = Literal["float32", "bfloat16"]
Objective = Literal["clm", "slm", "random", "self-ref-loss", "self-ref-entropy", "self-ref-both"]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]  # it becomes a folder's
MOST_TOKENS = 2**31 - 1
MOST_VALUES = 10_000  # of a config file: a handful of YAML aliases can stand for more than any memory holds


class Section(BaseModel):
    """A part of the config: immutable, and a misspelt field is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Context(Section):
    """The context policy: which tokens a loss is conditioned on, the same in both stages."""

    window: int = Field(default=2048, ge=2, le=MOST_TOKENS, description="most tokens the model attends over")
    bos: bool = Field(default=True, description="the first window of a document begins with the tokenizer's BOS")
    eos: bool = Field(default=True, description="the last window of a document ends with the tokenizer's EOS")


class Corpus(Section):
    """Where documents come from: files (local paths, globs, URLs of object stores and of fsspec) or a Hugging Face dataset by name."""

    paths: list[str] = Field(
        default=[], description=".parquet, .jsonl.zst, .jsonl.gz or .jsonl; globs and URLs allowed"
    )
    dataset: str | None = Field(
        default=None, description="Hugging Face dataset, `org/name` or `org/name@revision`, or local folder"
    )
    split: str = "train"
    text: str = Field(default="text", description="column that holds the document's text")
    messages: str | None = Field(
        default=None,
        description="for fine-tuning, instead of `text`: column of a conversation's messages, of which what the assistant"
        " says is trained on; rows without it are one turn if they hold a prompt (or instruction) and a response",
    )
    template: str | None = Field(
        default=None,
        description="chat template of `messages`: problem, alpaca, tora, or a Jinja file; null: the tokenizer's own",
    )
    id: str | None = Field(default="url", description="column that names the document; null: <shard>#<row>")
    max_chars: int = Field(default=5_000_000, ge=1, description="a longer document goes to quarantine")

    @model_validator(mode="after")
    def _one_origin(self) -> "Corpus":
        if bool(self.paths) == bool(self.dataset):
            raise ValueError("give either `paths` or `dataset`")
        if self.template and not self.messages:
            raise ValueError("a `template` is for conversations: name the column of their `messages`")
        return self


class Score(Section):
    """Stage 1: how reference losses are computed."""

    model: str = Field(description="the reference model: local folder or Hugging Face name, `org/name@revision`")
    output: AnyPlace = Field(description="folder, or URL of an object store, of the scores; default: {root}/scores")
    engine: Literal["hf", "vllm"] = Field(default="hf", description="hf: packed Hugging Face forward; vllm: its own")
    python: Path | None = Field(default=None, description="the Python that workers run in; null: the driver's own")
    dtype: Dtype = "bfloat16"
    batch_tokens: int = Field(
        default=16_384, ge=1, le=MOST_TOKENS, description="tokens of one forward pass of one worker"
    )
    unit_bytes: int = Field(
        default=64_000_000, ge=1, description="input bytes of one unit, the least work a crash can cost"
    )
    workers: int = Field(default=1, ge=1, le=100_000)
    cpus_per_worker: int = Field(
        default=1, ge=1, le=4096, description="also the worker's thread count: it is part of the arithmetic"
    )
    gpus_per_worker: float = Field(default=0, ge=0)
    address: str | None = Field(default=None, description="null: a local Ray; auto: the cluster this node belongs to")
    entropy: bool = Field(default=False, description="also store ref_entropy")
    compile: bool = Field(default=False, description="compile the model's layers: a slower start, a faster forward")
    attempts: int = Field(default=3, ge=1, description="deaths of a worker after which a unit is given up")
    unit_timeout_seconds: float | None = Field(
        default=None, gt=0, description="longest time of one unit; null: 20 times what the slowest so far would need"
    )
    max_quarantined: float = Field(
        default=0.1, ge=0, le=1, description="a larger share of documents that could not be scored is an error"
    )


Places = Annotated[list[AnyPlace], BeforeValidator(lambda given: given if isinstance(given, list) else [given])]


class Part(Section):
    """One part of a mixture."""

    scores: Places = Field(min_length=1, description="as `train.scores`")
    weight: float = Field(gt=0, description="share of the tokens, in any unit")


class Train(Section):
    """One training run; the reference's run and the live model's run share these fields."""

    scores: Places = Field(
        default=[],
        description="score datasets to train on; none: score.output. Several are references over one corpus: tokens of"
        " the first, scores the mean of all",
    )
    mixture: list[Part] = Field(default=[], description="instead of `scores`: several corpora by weight in tokens")
    skip: list[tuple[int, int]] = Field(
        default=[],
        description="windows left out: from and to (exclusive), places in the order, as `position` in metrics.jsonl."
        " What lies ahead of a run may be changed",
    )
    output: Folder = Field(
        description="folder of the runs; default: {root}/train, and {root}/reference for the reference"
    )
    run: Name | None = Field(default=None, description="the run's own folder below `output`; null: the objective")
    objective: Objective = "clm"
    keep: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="share of valid tokens to train on; for `self-ref-both` the share that each of its two scores keeps,"
        " of which what both keep is trained on; nothing to `clm`",
    )
    scope: Literal["micro", "sequence", "step"] = Field(
        default="micro", description="what tokens are ranked over: a forward of all ranks, a window, an optimizer step"
    )
    seed: Seed = 0
    epochs: float | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0, description="length of the run in row tokens (padding counted)")
    tokens_per_step: int = Field(default=1_048_576, ge=1, le=MOST_TOKENS)
    row_tokens: int | None = Field(
        default=None, ge=2, le=MOST_TOKENS, description="tokens of one packed row; null: context.window"
    )
    micro_rows: int = Field(default=8, ge=1, description="most rows of one forward and backward on one rank")
    shuffle_groups: int = Field(default=16, ge=1, description="row groups shuffled together, held in memory")
    learning_rate: float = Field(default=8e-5, gt=0)
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = Field(default=0.02, ge=0, lt=1, description="share of the run")
    decay: float = Field(default=0.2, gt=0, le=1, description="share of the run that `wsd` decays over")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    skip_spikes: float | None = Field(
        default=None, gt=1, description="steps whose gradient norm is over so many times the median of 64 are not taken"
    )
    dtype: Dtype = "bfloat16"
    shard_ranks: int | None = Field(
        default=None,
        ge=1,
        description="ranks that hold one copy of the model between them, e.g. the GPUs of a node; null: all of them",
    )
    wandb: str | None = Field(default=None, description="project of Weights & Biases to log to as well, if installed")
    profile: tuple[int, int] | None = Field(
        default=None,
        description="steps to trace, from and to (exclusive): a Chrome trace a rank in the run's `profile`",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="full: layers keep their input alone and run again in the backward; selective: they keep the results of"
        " products and attention too",
    )
    backward: Literal["full", "kept"] = Field(
        default="full",
        description="kept: through the layers too only kept tokens carry gradients. Faster, and an approximation",
    )
    compile: bool = Field(
        default=False, description="compile the model's layers: a slower start, faster steps on a GPU"
    )
    dropout: bool = Field(default=False, description="train with the dropout that the model's own config names")
    checkpoint_every: int = Field(default=500, ge=1, description="steps")
    partial: bool = Field(default=False, description="train on a score dataset that is not finished")
    cache: Folder | None = Field(
        default=None, description="folder, on a local disk, for scores read from an object store; null: a temporary one"
    )
    cache_bytes: int = Field(default=20_000_000_000, ge=0, description="most that `cache` holds on a node")
    keep_checkpoints: int = Field(default=2, ge=1, description="newest ones that are kept")
    keep_every: int = Field(default=0, ge=0, description="checkpoints whose step it divides are kept for good; 0: none")
    evaluate_every: int = Field(default=0, ge=0, description="steps; 0: only at the start and the end")

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.epochs is None) == (self.tokens is None):
            raise ValueError("give either `epochs` or `tokens`")
        return self

    @field_validator("profile")
    @classmethod
    def _some_steps(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps and not 1 <= steps[0] < steps[1]:
            raise ValueError("give the first step (1 or more) and the one after the last")
        return steps

    @model_validator(mode="after")
    def _one_way_back(self) -> "Train":
        if self.backward == "kept" and self.compile:
            raise ValueError("`backward: kept` has another shape every step, which `compile` cannot take: choose one")
        return self

    @model_validator(mode="after")
    def _one_data(self) -> "Train":
        if self.scores and self.mixture:
            raise ValueError("give either `scores` or `mixture`")
        gaps = [(-1, 0), *self.skip]
        if any(start >= end or start < before for (_, before), (start, end) in pairwise(gaps)):
            raise ValueError("`skip` must be ranges [from, to] in ascending order, none empty or into another")
        return self

    @property
    def folder(self) -> Path:
        """Where this run writes."""
        return self.output / (self.run or self.objective)


class Reference(Section):
    """The reference model: the base trained further on a small curated corpus (Rho-1, section 3.1)."""

    corpus: Corpus
    train: Train

    @model_validator(mode="after")
    def _no_scores(self) -> "Reference":
        if self.train.scores or self.train.mixture:
            raise ValueError("a reference trains on its `corpus`: leave out train.scores and train.mixture")
        return self


class Evaluation(Section):
    """Held-out material: JSON lines of {prompt, text}, of {prompt, answer} and of {prompt, choices, right}."""

    target: Path | None = Field(default=None, description="test texts: what a claim is measured on")
    validation: Path | None = Field(
        default=None, description="texts apart from the test's: what settings are chosen on"
    )
    conversations: Path | None = Field(
        default=None, description="rows as those of corpus.messages: the loss of what the assistant says is measured"
    )
    problems: Path | None = None
    choices: Path | None = Field(default=None, description="problems whose right answer is ranked among others")
    batch_tokens: int = Field(default=16_384, ge=1, le=MOST_TOKENS, description="tokens of one forward")
    new_tokens: int = Field(default=200, ge=1, description="longest answer generated to a problem")


class Demo(Section):
    """What the demo makes, in bytes of UTF-8 text at scale 1; nothing else reads it."""

    manuals: int = Field(default=1_900_000, gt=0, description="pages of the corpus")
    problems: int = Field(default=400_000, ge=0, description="worked problems hidden in these pages")
    solutions: int = Field(default=200_000, ge=0, description="solutions, right and wrong, hidden in these pages")
    curated_problems: int = Field(default=500_000, ge=0, description="worked problems of the curated corpus")
    curated_solutions: int = Field(default=350_000, ge=0, description="right solutions of the curated corpus")
    base_manuals: int = Field(default=2_500_000, gt=0, description="pages that the base model is trained on")
    base_epochs: float = Field(default=0.8, gt=0)
    small_layers: int | None = Field(
        default=None, ge=1, description="layers of a second base, {root}/small; null: none is made"
    )


class Config(Section):
    """Everything one experiment needs."""

    name: str
    root: Folder = Field(description="folder of all that the experiment makes; default: runs/<name>")
    base: str = Field(description="what both the reference and the live model start from; named as `score.model`")
    context: Context = Context()
    corpus: Corpus
    reference: Reference | None = None
    score: Score
    train: Train
    eval: Evaluation = Evaluation()
    demo: Demo = Demo()

    @property
    def parts(self) -> list[Part]:
        """What the live model trains on: the parts of its mixture, or one; by default what `tokensift score` makes."""
        return self.train.mixture or [Part(scores=self.train.scores or [self.score.output], weight=1)]

    @model_validator(mode="before")
    @classmethod
    def _below_the_root(cls, raw: Any) -> Any:
        """Fill in `root` and the folders below it, and put it where texts say `{root}`."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("root", ""), str | Path):
            return raw  # the fields' own checks say what is wrong
        root = str(raw.get("root") or f"runs/{raw.get('name')}")
        filled = {"root": root, **raw}
        score = raw.get("score", {"model": f"{root}/reference/final"})  # what is fine-tuned without scores has none
        for name, section, folder in (("score", score, "scores"), ("train", raw.get("train"), "train")):
            filled[name] = _with_output(section, f"{root}/{folder}")
        if isinstance(reference := raw.get("reference"), Mapping):
            filled["reference"] = {**reference, "train": _with_output(reference.get("train"), f"{root}/reference")}
        return _replace(filled, "{root}", root)


def _with_output(section: Any, folder: str) -> Any:
    return {"output": folder, **section} if isinstance(section, Mapping) else section


def _replace(value: Any, mark: str, text: str) -> Any:
    if isinstance(value, str):
        return value.replace(mark, text)
    if isinstance(value, Mapping):
        return {key: _replace(item, mark, text) for key, item in value.items()}
    return [_replace(item, mark, text) for item in value] if isinstance(value, list) else value


def load_config(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a config file; `overrides` are dotted fields (`train.keep`) with their values.

    Raises UserError naming the file and each wrong field.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "give a config with --config") from error
    except ValueError as error:
        raise UserError(f"{path}: {first_line(error)}", "mend it; `tokensift init` writes one that works") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of fields", "write it as in configs/demo.yaml")
    for field, value in (overrides or {}).items():
        _set(raw, field, value)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        wrong = "; ".join(_describe(item) for item in error.errors())
        raise UserError(f"{path}: {wrong}", "see configs/ for examples") from error


def parse_yaml(text: str) -> Any:
    """One YAML value. Raises ValueError, saying what is wrong in a line, for all that is not one of sane size."""
    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError("is not valid YAML: " + " ".join(str(error).split())) from None
    waiting, seen = [value], 0
    while waiting:
        item = waiting.pop()
        waiting += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        if (seen := seen + 1) > MOST_VALUES:
            raise ValueError(f"holds more than {MOST_VALUES} values, or itself")
    return value


def _set(raw: dict[str, Any], field: str, value: Any) -> None:
    *parents, leaf = field.split(".")
    node: Any = raw
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"--set {field}: `{parent}` holds {node!r}, which has no fields", f"override `{parent}`")
    node[leaf] = value


def _describe(item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"]) or "config"
    return f"field `{field}`: {item['msg'].removeprefix('Value error, ')}"
