"""Runs of the trainer as the config describes them: the reference's on curated text, the live model's on scores."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.evaluation.evaluate import HeldOutLosses
from pipeline.progress import bar, say
from pipeline.tokens import tokenised
from schemas.config import Config, Train
from schemas.conversation import template_hash, templated
from schemas.errors import UserError
from schemas.fingerprint import difference, tokenizer_fingerprint
from schemas.hub import known_as
from schemas.models import local_model, open_tokenizer
from trainer.board import require_wandb
from trainer.cache import Cache
from trainer.data import ScoreShards, Source
from trainer.loop import Run, Stopped, train
from trainer.mixture import Mixture
from trainer.ranks import Ranks, die_with_parent, joined
from trainer.references import References

TOKENS = "tokens"  # folder of the reference's corpus, below its output
RESPONSES_ALONE = "conversations: only what the assistant says in them counts as tokens to train on"
BLOCKS = "▁▂▃▄▅▆▇█"


def train_live(config: Config) -> Path:
    """Stage 2: train from the base on stored scores; one folder a run. Returns the final model's folder."""
    die_with_parent()
    settings, base, source, tokenizer = prepared(config)
    return run_training(f"train {settings.output.name}", config, settings, base, lambda _: source, tokenizer)


def prepared(config: Config) -> tuple[Train, Path, Source, Any]:
    """Settings, base, data and tokenizer of a live model's run. Raises UserError if they do not fit together."""
    settings = config.train.model_copy(update={"output": config.train.folder})
    datasets = open_scores(config)
    base = local_model(config.base)
    tokenizer = templated(open_tokenizer(base, "base"), config.corpus)
    return settings, base, source_of(config, datasets, tokenizer), tokenizer


def open_scores(config: Config) -> list[list[ScoreShards]]:
    """The score datasets that a run reads: of each part of its mixture its references."""
    cache = Cache(config.train.cache, config.train.cache_bytes)
    return [[ScoreShards(place, config.train.partial, cache) for place in part.scores] for part in config.parts]


def source_of(config: Config, datasets: list[list[ScoreShards]], tokenizer: Any) -> Source:
    """A run's score datasets as one. Raises UserError if tokens or context of one are not those of the live model."""
    expected = {"tokenizer": tokenizer_fingerprint(tokenizer), "context": config.context.model_dump()}
    for found in (one for part in datasets for one in part):
        changed = difference({name: found.dataset[name] for name in expected}, expected)
        if changed:
            raise UserError(
                f"{found.root}: scored otherwise than `base` and `context` say:\n  " + "\n  ".join(changed),
                "use the same tokenizer and context",
            )
        if found.conversations and found.dataset["corpus"]["template"] != template_hash(tokenizer):
            raise UserError(
                f"{found.root}: its conversations were rendered by another chat template than the model would be saved with",
                "set corpus.messages and corpus.template as they were when it was scored",
            )
    sources = [part[0] if len(part) == 1 else References(part) for part in datasets]
    return sources[0] if len(sources) == 1 else Mixture(sources, [part.weight for part in config.parts])


def train_reference(config: Config) -> Path:
    """Train the reference from the base on the curated corpus (Rho-1, section 3.1). Returns its folder."""
    die_with_parent()
    if config.reference is None:
        raise UserError("field `reference`: missing", "give its corpus and train settings, or a finished score.model")
    base, settings, corpus = local_model(config.base), config.reference.train, config.reference.corpus
    tokenizer = open_tokenizer(base, "base")
    source = partial(tokenised, corpus, tokenizer, config.context, settings.output / TOKENS)
    return run_training("train reference", config, settings, base, source, tokenizer)


def names_of(base: Path, source: Source) -> dict[str, str]:
    """What base, references and corpora are known as on the hub, references of this machine by hashes of their files; and
    what kind of data it is, if not texts.
    """
    names = {
        "base": known_as(base),
        "reference": ", ".join(sorted(source.scored_by)),
        "corpus": ", ".join(sorted(source.made_of)),
        "data": RESPONSES_ALONE if source.conversations else None,
    }
    return {what: name for what, name in names.items() if name}


def described(row: dict[str, Any]) -> tuple[str, str]:
    """A row of metrics in two lines: how fast it goes, and what is learnt and selected."""
    speed = f"{row['tokens_per_second']:,.0f} tokens/s ({row['mfu']:.0%} MFU)"
    first = [f"step {row['step']:,}", f"{row['tokens_seen']:,} tokens", speed]
    second = [f"loss kept {row['loss_kept']:.3f}"]
    if row["loss_dropped"] is not None:
        second += [f"dropped {row['loss_dropped']:.3f}"]
    if row["threshold"] is not None:
        second += [f"threshold {row['threshold']:.3g}", f"scores {blocks(row['score_over'])}"]
    second += [f"gradient {row['grad_norm']:.2g}", f"waiting for data {row['data_wait']:.0%}"]
    return " · ".join(first), " · ".join(second)


def blocks(over: list[float]) -> str:
    """The histogram that shares of tokens over ascending edges make, as one block a bin; the highest is full."""
    shares = [one - other for one, other in pairwise([1.0, *over, 0.0])]
    return "".join(BLOCKS[round(share / max(shares) * (len(BLOCKS) - 1))] for share in shares)


def run_training(
    title: str, config: Config, settings: Train, base: Path, data: Callable[[Ranks], Source], tokenizer: Any
) -> Path:
    """Run the trainer with a live view and held-out evaluation; every rank calls for the `data` together."""
    require_wandb(settings.wandb)
    losses = HeldOutLosses(config, tokenizer)
    evaluate = losses if losses.sets else None
    with joined() as ranks:
        source = data(ranks)
        try:
            with bar(title, show=ranks.first) as progress:

                def show(row: dict[str, Any], done: float) -> None:
                    progress.update(done, *described(row))

                names = names_of(base, source)
                return train(Run(settings, config.context, base, source, tokenizer, ranks, evaluate, show, names))
        except Stopped as stopped:
            if ranks.first:
                say(f"{title}: stopped after step {stopped.step}, which is saved; the same command goes on from there")
            raise
