"""The config: one YAML file for every verb. Unknown fields are refused, paths are relative to the working folder."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from schemas.errors import UserError

Dtype = Literal["float32", "bfloat16"]
Objective = Literal["clm", "slm", "random"]


class Section(BaseModel):
    """A part of the config: immutable, and a misspelt field is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Context(Section):
    """The context policy: which tokens a loss is conditioned on, the same in both stages."""

    window: int = Field(default=2048, ge=2, description="most tokens the model attends over")
    bos: bool = Field(default=True, description="the first window of a document begins with the tokenizer's BOS")
    eos: bool = Field(default=True, description="the last window of a document ends with the tokenizer's EOS")


class Corpus(Section):
    """Where documents come from: files (local paths, globs, fsspec URLs) or a Hugging Face dataset by name."""

    paths: list[str] = Field(
        default=[], description=".parquet, .jsonl.zst, .jsonl.gz or .jsonl; globs and URLs allowed"
    )
    dataset: str | None = Field(default=None, description="Hugging Face dataset name or local dataset folder")
    split: str = "train"
    text: str = Field(default="text", description="column that holds the document's text")
    id: str | None = Field(default="url", description="column that names the document; null: <shard>#<row>")
    max_chars: int = Field(default=5_000_000, ge=1, description="a longer document goes to quarantine")

    @model_validator(mode="after")
    def _one_origin(self) -> "Corpus":
        if bool(self.paths) == bool(self.dataset):
            raise ValueError("give either `paths` or `dataset`")
        return self


class Score(Section):
    """Stage 1: how reference losses are computed."""

    model: str = Field(description="the reference model: Hugging Face name or local folder")
    output: Path
    engine: Literal["hf", "vllm"] = Field(default="hf", description="hf: packed Hugging Face forward; vllm: its own")
    dtype: Dtype = "bfloat16"
    batch_tokens: int = Field(default=16_384, ge=1, description="tokens of one forward pass of one worker")
    unit_bytes: int = Field(
        default=64_000_000, ge=1, description="input bytes of one unit, the least work a crash can cost"
    )
    workers: int = Field(default=1, ge=1)
    cpus_per_worker: int = Field(
        default=1, ge=1, description="also the worker's thread count: it is part of the arithmetic"
    )
    gpus_per_worker: float = Field(default=0, ge=0)
    address: str | None = Field(default=None, description="null: a local Ray; auto: the cluster this node belongs to")
    entropy: bool = Field(default=False, description="also store ref_entropy")
    attempts: int = Field(default=3, ge=1, description="deaths of a worker after which a unit is given up")
    max_quarantined: float = Field(
        default=0.1, ge=0, le=1, description="a larger share of documents that could not be scored is an error"
    )


class Train(Section):
    """One training run; the reference's run and the live model's run share these fields."""

    output: Path
    objective: Objective = "clm"
    keep: float = Field(default=0.6, gt=0, le=1, description="share of valid tokens that `slm` and `random` train on")
    scope: Literal["micro", "sequence"] = "micro"
    seed: int = 0
    epochs: float | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0, description="length of the run in row tokens (padding counted)")
    tokens_per_step: int = Field(default=1_048_576, ge=1)
    row_tokens: int | None = Field(default=None, description="tokens of one packed row; null: context.window")
    micro_rows: int = Field(default=8, ge=1, description="most rows of one forward and backward on one rank")
    shuffle_groups: int = Field(default=16, ge=1, description="row groups shuffled together, held in memory")
    learning_rate: float = Field(default=8e-5, gt=0)
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = Field(default=0.02, ge=0, lt=1, description="share of the run")
    decay: float = Field(default=0.2, gt=0, le=1, description="share of the run that `wsd` decays over")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    dtype: Dtype = "bfloat16"
    dropout: bool = Field(default=False, description="train with the dropout that the model's own config names")
    checkpoint_every: int = Field(default=500, ge=1, description="steps")
    partial: bool = Field(default=False, description="train on a score dataset that is not finished")
    keep_checkpoints: int = Field(default=2, ge=1)
    evaluate_every: int = Field(default=0, ge=0, description="steps; 0: only at the start and the end")

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.epochs is None) == (self.tokens is None):
            raise ValueError("give either `epochs` or `tokens`")
        return self


class Reference(Section):
    """The reference model: the base trained further on a small curated corpus (Rho-1, section 3.1)."""

    corpus: Corpus
    train: Train


class Evaluation(Section):
    """Held-out material: JSON lines of {prompt, text} and of {prompt, answer}."""

    target: Path | None = None
    problems: Path | None = None
    batch_tokens: int = 16_384
    new_tokens: int = Field(default=200, ge=1, description="longest answer generated to a problem")


class Config(Section):
    """Everything one experiment needs."""

    name: str
    base: str = Field(description="the model both the reference and the live model start from")
    context: Context = Context()
    corpus: Corpus
    reference: Reference | None = None
    score: Score
    train: Train
    eval: Evaluation = Evaluation()


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a config file; `overrides` are dotted fields (`train.keep`) with their values.

    Raises UserError naming the file and each wrong field.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a config with --config") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of fields, as in configs/demo.yaml")
    for dotted, value in (overrides or {}).items():
        *parents, leaf = dotted.split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(_describe(item) for item in error.errors())) from error


def _describe(item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"]) or "config"
    return f"field `{field}`: {item['msg']}"
