"""`tokensift dynamics`: the loss of single tokens over a run's checkpoints, and which of them would be selected when.

Figures go to `dynamics.json`, a row a token to `dynamics.parquet`; the rules are in `pipeline.trend`.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.heldout import Continuations, read_rows
from pipeline.inspect import spell
from pipeline.progress import bar, console
from pipeline.train import prepared
from pipeline.trend import CATEGORIES, PAPER, agreement, categories, changes, means_by
from schemas.config import Config
from schemas.errors import UserError, printable
from schemas.loss import batch_losses
from schemas.models import local_model, open_model, open_tokenizer
from schemas.shard import Window
from schemas.store import write_atomic
from trainer.checkpoint import STATE, read_sealed
from trainer.export import as_model
from trainer.loop import CHECKPOINTS
from trainer.selection import select_top
from trainer.stream import Order

COLOURS = dict(zip(CATEGORIES, ("#e8635c", "#f2a765", "#7fb2e6", "#a3d37c"), strict=True))
SHOWN_TOKENS = 300
FEWEST_CHECKPOINTS = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """Windows whose tokens are followed. starts: the first token of each that is judged; of: where they come from."""

    windows: list[Window]
    starts: list[int]
    of: str

    def places(self) -> list[np.ndarray]:
        """The judged tokens of each window: from its start on, of a conversation those that are trained on."""
        return [
            np.arange(start, len(window.tokens)) if window.trained is None else np.flatnonzero(window.trained)
            for window, start in zip(self.windows, self.starts, strict=True)
        ]

    def judged(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The judged tokens' values, window after window."""
        return np.concatenate([one[places] for one, places in zip(values, self.places(), strict=True)])


def dynamics(config: Config, models: list[str], on_target: bool, tokens: int, output: Path | None) -> dict[str, Any]:
    """Follow a sample through `models`, in their order; by default the base and the checkpoints that the run kept.

    `on_target`: texts of eval.target instead of at least `tokens` tokens of the corpus. Raises UserError for too few models,
    and for a sample without tokens.
    """
    chosen = models or kept_models(config)
    if len(chosen) < FEWEST_CHECKPOINTS:
        raise UserError(
            f"{config.train.folder}: {len(chosen)} models to follow tokens through; it takes {FEWEST_CHECKPOINTS}",
            "train with train.keep_every, which keeps checkpoints for good, or name model folders",
        )
    folders = [local_model(name) for name in chosen]
    places = [
        start() if name == config.base else state_of(folder) for name, folder in zip(chosen, folders, strict=True)
    ]
    sample = target_sample(config) if on_target else corpus_sample(config, places[-1]["position"], tokens)
    with bar("dynamics") as progress:
        columns = []
        for number, folder in enumerate(folders):
            progress.update(number / len(folders), folder.name)
            columns.append(sample.judged(window_losses(config, folder, sample.windows)))
        reference = reference_losses(config, sample)
    found = Followed(np.stack(columns), reference, config.train.keep)
    head = {"run": str(config.train.folder), "sample": sample.of, "windows": len(sample.windows)}
    points = [{"model": name, **place} for name, place in zip(chosen, places, strict=True)]
    figures = {**head, "tokens": found.losses.shape[1], "checkpoints": points, **found.figures()}
    output = output or config.train.folder
    tokenizer = open_tokenizer(local_model(config.base), "base")
    write_atomic(output / "dynamics.parquet", encode(sample, found, tokenizer))
    write_atomic(output / "dynamics.json", (json.dumps(figures, indent=1) + "\n").encode())
    show(figures)
    console.print(coloured(sample, found, tokenizer), soft_wrap=True)
    return figures


def kept_models(config: Config) -> list[str]:
    """The base, then the run's checkpoints by step."""
    steps = sorted((config.train.folder / CHECKPOINTS).glob("step-*"))
    return [config.base, *map(str, steps)]


def start() -> dict[str, int]:
    """What a run counts before its first step. The base may be another run's end, whose counts are not this one's."""
    return dict.fromkeys(("step", "tokens_seen", "position"), 0)


def state_of(folder: Path) -> dict[str, int]:
    """Step, tokens seen and place in the order, as a checkpoint or a run's final model says; zeros for another model."""
    if not (folder / STATE).exists():
        return start()
    state = read_sealed(folder)["state"]
    return {name: int(state[name]) for name in start()}


def corpus_sample(config: Config, position: int, tokens: int) -> Sample:
    """Windows of the corpus that the run comes to after `position` and has not seen before; if there are none, its first."""
    settings, _, source, _ = prepared(config)
    order = Order(source, settings.seed, settings.shuffle_groups, skip=settings.skip)
    last, of = int(source.group_sizes.sum()), "corpus, windows that the run did not train on"
    windows = _take(order, position, last, tokens) if position else []
    if not windows:
        windows = _take(order, 0, last, tokens)
        of = (
            "corpus, windows that the run trained on" if position else "corpus; what the models trained on is not known"
        )
    if not windows:
        raise UserError("the corpus has no window of two tokens", "look at it with `tokensift inspect`")
    return Sample(windows, [1] * len(windows), of)


def _take(order: Order, position: int, last: int, tokens: int) -> list[Window]:
    windows: list[Window] = []
    for place, placed in order.windows(position):
        if tokens <= 0 or place >= last or placed.epoch:
            break
        if len(placed.window.tokens) > 1:
            windows.append(placed.window)
            tokens -= len(placed.window.tokens) - 1
    return windows


def target_sample(config: Config) -> Sample:
    """The texts of eval.target, each after its prompt."""
    if not config.eval.target:
        raise UserError("field `eval.target`: missing", "give it, or follow tokens of the corpus")
    tokenizer = open_tokenizer(local_model(config.base), "base")
    pairs = [(row["prompt"], row["text"]) for row in read_rows(config.eval.target, "eval.target", ("prompt", "text"))]
    texts = Continuations(pairs, tokenizer, config.context, config.eval.batch_tokens)
    windows = [Window(f"target {number}", 0, tokens, None) for number, tokens in texts.windows.items()]
    if not windows:
        raise UserError(f"eval.target: no row of {config.eval.target} fits in context.window", "raise the window")
    return Sample(windows, list(texts.starts.values()), "eval.target")


@torch.no_grad()
def window_losses(config: Config, folder: Path, windows: Sequence[Window]) -> list[np.ndarray]:
    """Float32 nats of each window's tokens under a model or checkpoint, NaN at position 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with as_model(folder) as model:
        opened = open_model(model, "model", config.context.window, device=device)
    found: dict[int, np.ndarray] = {}
    tokens = [window.tokens for window in windows]
    for members, batch in opened.collated(tokens, config.context.window, config.eval.batch_tokens):
        batch = batch.to(device)
        found |= dict(zip(members, batch.gather(batch_losses(opened, batch).loss), strict=True))
    return [found[index] for index in range(len(windows))]


def reference_losses(config: Config, sample: Sample) -> np.ndarray:
    """Nats of the judged tokens under the reference: as stored, else computed."""
    stored = [window.ref_loss for window in sample.windows]
    if any(values is None for values in stored):
        stored = window_losses(config, local_model(config.score.model, "score.model"), sample.windows)
    return sample.judged(stored).astype(np.float32)  # type: ignore[arg-type]


class Followed:
    """Tokens with their losses [checkpoints, tokens] and reference losses [tokens], in nats, and what follows from them."""

    def __init__(self, losses: np.ndarray, reference: np.ndarray, keep: float):
        self.losses, self.reference = losses, reference
        self.change, self.category = changes(losses), categories(losses)
        excess = torch.from_numpy(losses - reference)
        self.kept = np.stack([select_top(row, keep).numpy() for row in excess])  # of the whole sample
        self.keep = keep

    def figures(self) -> dict[str, Any]:
        """Shares, means of each category over the checkpoints, of what is selected first and the rest, how far selections agree."""
        shares = np.bincount(self.category, minlength=len(CATEGORIES)) / len(self.category)
        curves, kept = means_by(self.losses, self.category), means_by(self.kept, self.category)
        reference = means_by(self.reference, self.category)
        named = [
            {"share": share, "paper": PAPER[name], "reference_loss": ref, "loss": curve.tolist(), "kept": part.tolist()}
            for name, share, ref, curve, part in zip(CATEGORIES, shares, reference, curves, kept, strict=True)
        ]
        return {
            "categories": dict(zip(CATEGORIES, plain(named), strict=True)),
            "mean_loss": self.losses.mean(1, dtype=np.float64).tolist(),
            "selected_first": plain(
                dict(zip(("rest", "loss"), means_by(self.losses, self.kept[0], 2).tolist(), strict=True))
            ),
            "keep": self.keep,
            "agreement": agreement(self.kept).tolist(),
        }


def plain(value: Any) -> Any:
    """What JSON can hold: NaN as null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if value != value else float(value)


def encode(sample: Sample, found: Followed, tokenizer: Any) -> bytes:
    """A row a judged token, as the bytes of a Parquet file."""
    places = sample.places()
    counts = list(map(len, places))
    tokens = sample.judged([window.tokens for window in sample.windows])
    spelt = sample.judged([np.array(spell(tokenizer, w.tokens.tolist()), dtype=object) for w in sample.windows])
    names = pa.array(CATEGORIES).dictionary_encode()
    points = len(found.losses)

    def over_checkpoints(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.T.ravel()), points)

    table = pa.table(
        {
            "doc_id": np.repeat(np.array([window.doc_id for window in sample.windows], dtype=object), counts),
            "window": np.repeat(np.array([window.index for window in sample.windows], dtype=np.int32), counts),
            "position": np.concatenate(places).astype(np.int32),
            "token": tokens,
            "text": spelt,
            "category": pa.DictionaryArray.from_arrays(pa.array(found.category), names.dictionary),
            "change": found.change,
            "ref_loss": found.reference,
            "losses": over_checkpoints(found.losses.astype(np.float32)),
            "kept": over_checkpoints(found.kept),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def show(figures: dict[str, Any]) -> None:
    """The figures as a table and a few sentences."""
    points = figures["checkpoints"]
    last = len(points) - 1
    table = Table("tokens", "share", "in the paper", "loss, first", "loss, last", "reference", "selected first", "last")
    for name, row in figures["categories"].items():
        loss, kept = (
            ["-" if v is None else f"{v:.2f}" for v in (row["loss"][0], row["loss"][-1], row["reference_loss"])],
            ["-" if v is None else f"{v:.0%}" for v in (row["kept"][0], row["kept"][-1])],
        )
        table.add_row(
            Text(name, style=f"black on {COLOURS[name]}"), f"{row['share']:.1%}", f"{row['paper']:.0%}", *loss, *kept
        )
    console.print(table)
    models = Table("model", "step", "loss, all tokens", "selected first", "the rest")
    of_first = figures["selected_first"]
    for point, *losses in zip(points, figures["mean_loss"], of_first["loss"], of_first["rest"], strict=True):
        name = Path(point["model"])
        cells = ["-" if loss is None else f"{loss:.2f}" for loss in losses]
        models.add_row(printable(f"{name.parent.name}/{name.name}"), f"{point['step']:,}", *cells)
    console.print(models)
    agree = figures["agreement"]
    console.print(
        f"{figures['tokens']:,} tokens of {figures['sample']}, through {len(points)} models; losses in nats. Of the"
        f" {figures['keep']:.0%} selected first, {agree[0][last // 2]:.0%} are selected in the middle too, and"
        f" {agree[0][last]:.0%} at the end; chance would give {figures['keep']:.0%}."
    )


def coloured(sample: Sample, found: Followed, tokenizer: Any) -> Text:
    """The first window, each judged token on the colour of its category."""
    window = sample.windows[0]
    words = spell(tokenizer, window.tokens[:SHOWN_TOKENS].tolist())
    text = Text.assemble("\n", (printable(window.doc_id), "bold"), "\n")
    judged = dict(zip(sample.places()[0].tolist(), found.category.tolist(), strict=False))
    for place, word in enumerate(words):
        style = f"black on {COLOURS[CATEGORIES[judged[place]]]}" if place in judged else ""
        text.append(word, style=style)
    return text
