"""Laws 6 to 12 where only what an assistant wrote is trained on: against `oracle.py`, and against labels of -100."""

import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import trainer.loop
from pipeline.tokens import tokenised
from schemas.errors import UserError
from schemas.models import open_model, open_tokenizer
from schemas.receipt import Layout
from schemas.shard import open_shard, read_group
from tests.trainer.spawned import on_ranks, run_job
from tests.trainer.test_loop import same_rows, same_weights
from tests.trainer.test_oracle import WINDOW, compare, settings_of
from trainer.data import ScoreShards
from trainer.lengths import NAME
from trainer.live import Live
from trainer.mixture import Mixture
from trainer.ranks import ALONE, Ranks
from trainer.selection import Selection
from trainer.stream import Geometry, Order, steps

ONE = Ranks(0, 1, torch.device("cpu"))
CASES = {
    "clm": {"objective": "clm", "micro_rows": 2},
    "slm micro": {"objective": "slm", "scope": "micro", "micro_rows": 2},
    "slm sequence": {"objective": "slm", "scope": "sequence", "micro_rows": 4},
    "slm step": {"objective": "slm", "scope": "step", "micro_rows": 2},
    "random sequence": {"objective": "random", "scope": "sequence", "micro_rows": 8},
    "ref-loss micro": {"objective": "self-ref-loss", "scope": "micro", "micro_rows": 4},
    "both step": {"objective": "self-ref-both", "scope": "step", "micro_rows": 1},
}
TWO_RANKS = {
    "clm": {"objective": "clm", "micro_rows": 2},
    "slm micro": {"objective": "slm", "scope": "micro", "micro_rows": 1},
    "slm step": {"objective": "slm", "scope": "step", "micro_rows": 2},
    "random sequence": {"objective": "random", "scope": "sequence", "micro_rows": 2},
}


@pytest.fixture(scope="module")
def talks(make_config, score_here, corpus_tools, tmp_path_factory):
    """Scored conversations of one to three turns, from a few tokens to several windows, entropies with them."""
    folder, rng = tmp_path_factory.mktemp("talks"), random.Random(5)
    texts = [document["text"] for document in corpus_tools.make_documents(300, seed=31)]
    rows = []
    for number in range(90):
        messages = []
        for _ in range(rng.randrange(1, 4)):
            ask, reply = rng.choices(texts, k=2)
            cut = rng.choice([10, 40, 400])
            messages += [
                {"role": "user", "content": "a" + ask[:cut]},
                {"role": "assistant", "content": "b" + reply[:cut]},
            ]
        rows.append({"id": f"talk-{number}", "messages": messages})
    for part, name in enumerate(("one.jsonl.zst", "two.parquet")):
        corpus_tools.write_documents(folder / "corpus" / name, rows[part::2])
    config = make_config(folder, {"score.entropy": True})
    corpus = {"paths": [str(folder / "corpus" / "*")], "messages": "messages", "template": "problem", "id": "id"}
    return score_here(config.model_copy(update={"corpus": config.corpus.model_validate(corpus)}))


@pytest.fixture(scope="module")
def two_ranks(talks, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [(talks, settings_of(talks, folder / name, fields), tiny_model) for name, fields in TWO_RANKS.items()]
    on_ranks(2, folder, jobs)
    return folder


def stored(config):
    layout = Layout(config.score.output)
    for unit in layout.committed():
        path = layout.shard(unit)
        file = open_shard(path)
        for group in range(file.num_row_groups):
            yield from read_group(path, file, group)


@pytest.mark.parametrize("name", CASES)
def test_the_trainer_makes_the_steps_of_masked_cross_entropy_of_one_window_alone(talks, tiny_model, tmp_path, name):
    settings = settings_of(talks, tmp_path, CASES[name])
    run_job(talks, settings, tiny_model, ONE)
    rows, _ = compare(tmp_path, tiny_model, talks, CASES[name], 1)
    assert max(row["grad_norm"] for row in rows) > 2 * settings.clip


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_make_these_steps_too(talks, tiny_model, two_ranks, name):
    compare(two_ranks / name, tiny_model, talks, TWO_RANKS[name], 2)


def a_step(talks, objective="clm", scope="micro"):
    selection = Selection.of(objective, scope, 0.4)
    source = ScoreShards(talks.score.output)
    return next(steps(Order(source, 0, 2, selection.columns), Geometry(8, WINDOW, 8), 0)).micros[0], selection


def test_losses_and_gradients_are_those_of_labels_of_minus_100(talks, tiny_model):
    micro, _ = a_step(talks)
    live = Live(open_model(tiny_model, "base", WINDOW))
    (live(micro.batch, lambda losses: ~torch.isnan(losses)).loss_sum / sum(micro.counts)).backward()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for placed in micro.placed:
        window, labels = torch.from_numpy(placed.window.tokens), torch.from_numpy(placed.window.tokens.copy())
        labels[~torch.from_numpy(placed.window.trained)] = -100
        mean = model(input_ids=window[None], labels=labels[None]).loss
        (mean * int((labels != -100).sum()) / sum(micro.counts)).backward()
    for (name, ours), theirs in zip(live.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_law_6_excess_is_zero_and_law_7_exactly_the_share_of_trained_tokens_is_kept(talks, tiny_model):
    micro, selection = a_step(talks, "slm")
    live = Live(open_model(tiny_model, "base", WINDOW))
    with torch.no_grad():
        losses = live(micro.batch, lambda losses: ~torch.isnan(losses)).losses
    excess = selection.ranked(losses, micro.columns)
    trained = sum(int(placed.window.trained.sum()) for placed in micro.placed)
    assert int((~torch.isnan(excess)).sum()) == trained == sum(micro.counts)
    assert float(excess.nan_to_num().abs().max()) < 0.005
    assert int(selection.masks(losses[None], {k: v[None] for k, v in micro.columns.items()},
                               micro.batch.owner[None], ALONE).sum()) == round(0.4 * trained)  # fmt: skip


def test_law_8_ranks_plan_alike_from_the_index_alone(talks):
    source = ScoreShards(talks.score.output)
    ranks = [
        list(islice(steps(Order(source, 1, 2, ("ref_loss", "chance")), Geometry(8, WINDOW, 2, rank, 2), 7), 3))
        for rank in range(2)
    ]
    for one, other in zip(*ranks, strict=True):
        for mine, theirs in zip(one.micros, other.micros, strict=True):
            valid = [placed.window.valid for placed in (*mine.placed, *theirs.placed)]
            assert mine.counts == theirs.counts == valid == [*mine.batch.valid, *theirs.batch.valid]
            assert torch.equal(torch.isnan(mine.columns["chance"]), torch.isnan(mine.columns["ref_loss"]))


@pytest.mark.parametrize("objective", ["clm", "slm"])
def test_law_10_stopped_and_resumed_equals_uninterrupted(talks, tmp_path, train_here, monkeypatch, objective):
    fields = {"objective": objective, "epochs": 1, "checkpoint_every": 3}
    final, rows = train_here(talks, output=tmp_path / "whole", **fields)
    halted = tmp_path / "halted"
    real = trainer.loop.advance

    def cut(state, *arguments):
        if state.step == 4:
            raise KeyboardInterrupt
        return real(state, *arguments)

    monkeypatch.setattr(trainer.loop, "advance", cut)
    with pytest.raises(KeyboardInterrupt):
        train_here(talks, output=halted, **fields)
    monkeypatch.undo()
    again, more = train_here(talks, output=halted, **fields)
    assert [row["loss_kept"] for row in rows] == [row["loss_kept"] for row in more]
    same_rows(rows, more, 0)
    same_weights(final, again, 0)


def test_what_is_stored_is_what_was_tokenised_and_a_window_tells_which_tokens_count(talks, tmp_path):
    tokenizer = open_tokenizer(Path(talks.base), "base")
    source = tokenised(talks.corpus, tokenizer, talks.context, tmp_path, ALONE)
    scored = {(w.doc_id, w.index): w for w in stored(talks)}
    bare = [w for group in range(len(source.group_sizes)) for w in source.read(group)]
    assert len(bare) == len(scored) and source.columns == frozenset()
    for window in bare:
        other = scored[window.doc_id, window.index]
        assert window.tokens.tolist() == other.tokens.tolist() and window.trained.tolist() == other.trained.tolist()
        assert other.ref_loss is not None and len(other.ref_loss) == len(window.tokens)


def test_the_index_holds_both_counts_and_one_that_disagrees_is_refused(talks):
    source, windows = ScoreShards(talks.score.output), list(stored(talks))
    source.index(ALONE)
    assert (talks.score.output / NAME).stat().st_size == 16 + 2 * 4 * len(windows)
    again = ScoreShards(talks.score.output)
    keys = np.arange(len(windows))
    assert sorted(zip(again.lengths.tolist(), again.valid(keys).tolist(), strict=True)) == sorted(
        (len(window.tokens), int(window.trained.sum())) for window in windows
    )
    again._counts[1, 3] += 1
    with pytest.raises(UserError, match="index of lengths says"):
        list(islice(steps(Order(again, 0, 2), Geometry(8, WINDOW, 8), 0), 20))


def test_conversations_and_texts_mix_each_counting_its_own_tokens(talks, scores):
    parts = [ScoreShards(talks.score.output), ScoreShards(scores.score.output)]
    mixed = Mixture(parts, [1, 1])
    found = [placed for step in islice(steps(Order(mixed, 0, 2, ("ref_loss",)), Geometry(8, WINDOW, 8), 0), 4)
             for micro in step.micros for placed in micro.placed]  # fmt: skip
    assert {placed.window.trained is None for placed in found} == {True, False}
    keys = np.array([placed.key for placed in found])
    assert mixed.valid(keys).tolist() == [placed.window.valid for placed in found]
