"""Several references over one corpus: joined by what they scored, held against the plain Parquet files."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from schemas.errors import UserError
from tests.trainer.conftest import read_rows
from trainer.data import ScoreShards
from trainer.ranks import ALONE
from trainer.references import References


@pytest.fixture(scope="module")
def other(scores, corpus_tools, score_here, tmp_path_factory):
    """The same corpus under another reference, without entropies."""
    folder = tmp_path_factory.mktemp("other")
    model = corpus_tools.build_tiny_model(folder / "model", seed=5)
    changed = scores.score.model_copy(update={"model": str(model), "output": folder / "scores", "entropy": False})
    return score_here(scores.model_copy(update={"score": changed}))


@pytest.fixture
def both(scores, other):
    return [ScoreShards(config.score.output) for config in (scores, other)]


def rows_of(config):
    table = pq.read_table(config.score.output / "units")
    return {(row["doc_id"], row["row"], row["window"]): row for row in table.to_pylist()}


def test_tokens_are_the_first_ones_and_losses_the_mean_of_all(scores, other, both):
    joined, (one, another) = References(both), (rows_of(scores), rows_of(other))
    found = [window for group in range(len(joined.group_sizes)) for window in joined.read(group)]
    assert len(found) == len(one) == len(another) == joined.group_sizes.sum()
    assert joined.tokens == sum(len(row["tokens"]) for row in one.values())
    assert joined.columns == {"ref_loss"}  # the second one has no entropies
    differ = 0
    for window in found:
        key = window.doc_id, window.row, window.index
        assert window.tokens.tolist() == one[key]["tokens"]
        losses = np.array([one[key]["ref_loss"], another[key]["ref_loss"]], dtype=np.float64)
        np.testing.assert_allclose(window.ref_loss, losses.mean(0), rtol=1e-6)
        assert window.ref_entropy is None
        differ += np.nanmax(np.abs(losses[0] - losses[1]), initial=0) > 0.1
    assert differ > len(found) / 2


def test_the_fingerprint_knows_every_reference_and_which_comes_first(both):
    prints = [References(datasets).fingerprint for datasets in (both, both[::-1], [both[0], both[0]])]
    assert len({*prints, both[0].fingerprint}) == 4


def test_a_reference_beside_itself_trains_as_it_does_alone(scores, tmp_path, train_here):
    fields = {"epochs": 0.2, "objective": "slm"}
    path = scores.score.output
    for name, paths in {"alone": [path], "twice": [path, path]}.items():
        train_here(scores, output=tmp_path / name, scores=paths, **fields)
    figures = [[row["loss_kept"] for row in read_rows(tmp_path / name)] for name in ("alone", "twice")]
    assert figures[0] == figures[1] and len(figures[0]) > 1


@pytest.mark.parametrize("part", ["tokenizer", "context", "corpus"])
def test_a_dataset_of_other_tokens_is_refused_field_by_field(both, part):
    field = sorted(both[1].dataset[part])[0]
    both[1].dataset = {**both[1].dataset, part: {**both[1].dataset[part], field: "other"}}
    with pytest.raises(
        UserError, match=rf"stand beside .*\n  {part}\.{field}: .* stored, 'other' now; references of one"
    ):
        References(both)
    both[1].dataset |= {"context": both[1].dataset["context"] | {"window": "other", "eos": "other"}}
    with pytest.raises(UserError, match=r"\n  context\.eos: .* now\n  context\.window: .* now"):
        References(both)


def test_a_corpus_that_was_cut_otherwise_or_not_to_the_end_is_refused(scores, both):
    both[1].groups = both[1].groups[1:]
    with pytest.raises(UserError, match=r"has no scores of the rows of .*1 row groups.*score\.unit_bytes, to the end"):
        References(both)


def test_a_document_that_one_of_them_put_into_quarantine_is_named_by_its_shard(both):
    both[1].groups[0] = replace(both[1].groups[0], windows=both[1].groups[0].windows - 1)
    with pytest.raises(UserError, match=rf"{both[1].groups[0].path.name}: holds .*quarantine"):
        References(both)


def test_other_tokens_in_the_place_of_a_window_are_refused_by_name(both):
    joined, real = References(both), both[1].read
    changed = [replace(window, tokens=window.tokens + 1) for window in real(0)]
    joined.datasets[1].read = lambda *_: changed
    with pytest.raises(UserError, match=r"holds document .*, window 0, where .*or other tokens of it"):
        joined.read(0)


def test_row_groups_are_matched_by_their_input_wherever_they_stand(both):
    turned = SimpleNamespace(**vars(both[1]))
    turned.groups = both[1].groups[::-1]
    turned.read = lambda group, *rest: both[1].read(len(both[1].groups) - 1 - group, *rest)
    one, other = References(both), References([both[0], turned])
    for group in range(len(one.group_sizes)):
        for left, right in zip(one.read(group), other.read(group), strict=True):
            np.testing.assert_array_equal(left.ref_loss, right.ref_loss)


def test_references_are_the_first_ones_windows_with_the_names_of_all_that_scored_them(both):
    joined, first = References(both), both[0]
    assert joined.group_sizes is first.group_sizes and joined.conversations is first.conversations is False
    assert joined.scored_by == both[0].scored_by | both[1].scored_by and len(joined.scored_by) == 2
    assert joined.made_of == first.made_of and np.array_equal(joined.lengths, first.lengths)
    keys = np.array([3, 0, 7])
    assert joined.valid(keys).tolist() == (first.lengths[keys] - 1).tolist()
    asked = []
    first.index = asked.append
    joined.index(ALONE)
    assert asked == [ALONE]
    both[0].columns = both[1].columns | {"ref_entropy"}
    assert References(both).columns == both[1].columns and References(both[:1]).columns == both[0].columns


def test_rows_and_columns_are_asked_of_every_reference_and_both_scores_are_means(scores, both):
    again = ScoreShards(scores.score.output)  # with entropies
    real, asked = again.read, []
    again.read = lambda *call: (
        asked.append(call) or [replace(window, ref_entropy=window.ref_entropy + 1) for window in real(*call)]
    )
    joined, first = References([both[0], again]), both[0].read
    both[0].read = lambda *call: asked.append(call) or first(*call)
    (found, other), one = joined.read(0, [1, 0], ["ref_entropy"]), first(0)
    assert (
        asked == [(0, [1, 0], ["ref_entropy"])] * 2 and found.ref_loss is None and found.ref_entropy.dtype == np.float32
    )
    for window, plain in ((found, one[1]), (other, one[0])):
        assert window.tokens.tolist() == plain.tokens.tolist()
        np.testing.assert_allclose(window.ref_entropy, plain.ref_entropy.astype(np.float32) + 0.5, rtol=1e-3)


@pytest.mark.parametrize("changed", [{"doc_id": "another"}, {"index": 9}])
def test_another_document_or_window_of_the_same_tokens_is_refused_by_name(both, changed):
    joined, real = References(both), both[1].read
    both[1].read = lambda *call: [replace(window, **changed) for window in real(*call)]
    with pytest.raises(UserError, match=rf"holds document .*{next(iter(changed.values()))}.*; score the same corpus"):
        joined.read(0)
