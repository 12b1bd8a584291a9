"""Law 12 and the gate of stage 2: a score dataset is whole, of one setting, and every shard is its receipt's."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from schemas.errors import UserError
from schemas.receipt import Layout, read_receipts
from schemas.seal import unseal
from tests.helpers import edit_sealed
from tests.trainer.made import made, of_all
from trainer.data import ScoreShards, block_windows, ordered
from trainer.lengths import NAME as INDEX

PARTIAL = {"finished only": False, "partial": True}


@pytest.fixture
def dataset(scores, tmp_path):
    """A copy of the shared scores, and its units in order."""
    layout = Layout(shutil.copytree(scores.score.output, tmp_path / "scores"))
    return layout, layout.committed()


def windows(source):
    return int(source.group_sizes.sum())


def test_a_dataset_whose_scoring_has_not_ended_is_refused_unless_it_is_asked_for(dataset):
    layout, units = dataset
    layout.complete.unlink()
    with pytest.raises(
        UserError, match=rf"not come to its end \({len(units)} units so far\); run .*train\.partial: true"
    ):
        ScoreShards(layout.root)
    assert windows(ScoreShards(layout.root, partial=True)) > 0


def test_a_unit_without_its_receipt_is_missed_and_its_shard_is_never_read(dataset):
    layout, units = dataset
    whole = ScoreShards(layout.root)
    layout.receipt(units[0]).unlink()
    with pytest.raises(
        UserError, match=rf"1 of {len(units)} units have no receipt, first {units[0]}; run .*partial: true"
    ):
        ScoreShards(layout.root)
    left = ScoreShards(layout.root, partial=True)
    assert {group.path for group in left.groups} == {layout.shard(unit) for unit in units[1:]}
    assert windows(left) < windows(whole) and left.fingerprint != whole.fingerprint


@pytest.mark.parametrize("partial", PARTIAL.values(), ids=PARTIAL)
def test_a_unit_that_is_not_of_the_dataset_is_refused(dataset, partial):
    layout, units = dataset
    shutil.copy(layout.shard(units[0]), layout.shard("stranger"))
    shutil.copy(layout.receipt(units[0]), layout.receipt("stranger"))
    edit_sealed(layout.receipt("stranger"), unit="stranger", shard="units/stranger.parquet")
    with pytest.raises(UserError, match="1 units are not part of the dataset that was scored, first stranger; remove"):
        ScoreShards(layout.root, partial)


def test_one_shard_under_two_names_is_refused(dataset):
    layout, units = dataset
    layout.complete.unlink()  # else the stranger alone would be refused
    shutil.copy(layout.shard(units[0]), layout.shard("twin"))
    shutil.copy(layout.receipt(units[0]), layout.receipt("twin"))
    edit_sealed(layout.receipt("twin"), unit="twin", shard="units/twin.parquet")
    with pytest.raises(UserError, match=r"twin\.parquet: is not the shard that its receipt describes; delete it"):
        ScoreShards(layout.root, partial=True)


@pytest.mark.parametrize("partial", PARTIAL.values(), ids=PARTIAL)
def test_a_receipt_that_names_another_unit_is_refused(dataset, partial):
    layout, units = dataset
    shutil.copy(layout.receipt(units[1]), layout.receipt(units[0]))
    with pytest.raises(UserError, match=rf"{units[0]}\.json: is the receipt of unit '{units[1]}'"):
        ScoreShards(layout.root, partial)


def test_a_shard_swapped_for_another_of_its_size_is_refused(dataset):
    layout, units = dataset
    shutil.copy(layout.shard(units[1]), layout.shard(units[0]))
    edit_sealed(layout.receipt(units[0]), bytes=layout.shard(units[0]).stat().st_size)
    with pytest.raises(UserError, match=rf"{units[0]}.*is not the shard that its receipt describes"):
        ScoreShards(layout.root)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_of_another_size_than_its_receipt_says_is_refused(dataset, change):
    layout, units = dataset
    size = layout.shard(units[0]).stat().st_size
    edit_sealed(layout.receipt(units[0]), bytes=size + change)
    with pytest.raises(
        UserError, match=rf"{units[0]}\.parquet: missing or not the {size + change} bytes .*; see `tokensift verify`"
    ):
        ScoreShards(layout.root)


def test_a_missing_shard_is_refused(dataset):
    layout, units = dataset
    layout.shard(units[0]).unlink()
    with pytest.raises(UserError, match=rf"{units[0]}\.parquet: missing"):
        ScoreShards(layout.root, partial=True)


def test_a_receipt_of_another_number_of_windows_is_refused(dataset):
    layout, units = dataset
    edit_sealed(layout.receipt(units[0]), windows=1)
    with pytest.raises(UserError, match="is not the shard that its receipt describes"):
        ScoreShards(layout.root)


def test_a_dataset_of_no_receipts_says_how_to_get_some(dataset):
    layout, units = dataset
    for unit in units:
        layout.receipt(unit).unlink()
    with pytest.raises(UserError, match="no verified scores; run `make score`"):
        ScoreShards(layout.root, partial=True)


def test_the_fingerprint_knows_every_shard_and_setting(dataset):
    layout, units = dataset
    before = ScoreShards(layout.root).fingerprint
    assert ScoreShards(layout.root).fingerprint == before
    edit_sealed(layout.receipt(units[0]), sha256="0" * 64)
    assert ScoreShards(layout.root).fingerprint != before


@pytest.fixture
def several_groups(dataset):
    """The same dataset with at most three windows a row group, and its rows as pyarrow reads them, in stored order."""
    layout, units = dataset
    (layout.root / INDEX).unlink(missing_ok=True)  # a run of the whole session's scores may have left its index
    rows = []
    for unit in units:
        table = pq.read_table(layout.shard(unit))
        pq.write_table(table, layout.shard(unit), row_group_size=3)
        edit_sealed(layout.receipt(unit), bytes=layout.shard(unit).stat().st_size)
        rows += table.to_pylist()
    return layout, rows


def test_every_token_of_every_window_but_the_first_counts_and_no_row_group_is_left_out(several_groups):
    layout, rows = several_groups
    source = ScoreShards(layout.root)
    lengths = [len(row["tokens"]) for row in rows]
    assert max(np.bincount([list(layout.root.glob("units/*")).index(group.path) for group in source.groups])) > 2
    assert source.group_sizes.sum() == len(rows) and max(source.group_sizes) == 3
    assert source.lengths.tolist() == lengths and source.tokens == sum(lengths)
    keys = np.array([5, 0, len(rows) - 1])
    assert source.valid(keys).tolist() == [lengths[key] - 1 for key in keys]
    found = of_all(source)
    assert [(window.doc_id, window.index, window.tokens.tolist()) for window in found] == [
        (row["doc_id"], row["window"], row["tokens"]) for row in rows
    ]


def test_a_group_is_read_as_far_as_it_is_asked_for_and_knows_what_it_was_made_from(several_groups):
    layout, rows = several_groups
    source = ScoreShards(layout.root)
    assert source.columns == {"ref_loss", "ref_entropy"} and not source.conversations
    start = int(source.group_sizes[:4].sum())
    one, other = source.read(4, [2, 0], ["ref_entropy"])
    assert one.tokens.tolist() == rows[start + 2]["tokens"] and other.tokens.tolist() == rows[start]["tokens"]
    assert one.ref_loss is None and one.ref_entropy is not None
    (bare,) = source.read(4, [1], [])
    assert bare.ref_loss is None and bare.ref_entropy is None
    receipts = read_receipts(layout)
    for group in source.groups:
        receipt = receipts[group.path.stem]
        assert group.rows == (receipt.input_hash, receipt.first_document, receipt.end_document)
    assert len({group.rows for group in source.groups}) == len(receipts)


def print_of(layout, **changes):
    return unseal(layout.dataset.read_bytes())["fingerprint"] | changes


def rescored(layout, **scorer):
    """Have the dataset and each shard say that they were scored otherwise."""
    edit_sealed(layout.dataset, fingerprint=print_of(layout, scorer=print_of(layout)["scorer"] | scorer))
    for unit in layout.committed():
        resettled(layout, unit, **scorer)


def resettled(layout, unit, **scorer):
    table = pq.read_table(layout.shard(unit))
    stored = json.loads(table.schema.metadata[b"tokensift"])
    stored["fingerprint"]["scorer"] |= scorer
    if stored["fingerprint"]["scorer"]["engine"] is None:  # tokens alone
        table = table.drop_columns(["ref_loss", "ref_entropy"])
    pq.write_table(table.replace_schema_metadata({b"tokensift": json.dumps(stored)}), layout.shard(unit))
    edit_sealed(layout.receipt(unit), bytes=layout.shard(unit).stat().st_size)


def test_a_dataset_without_entropies_or_scores_does_not_say_that_it_has_them(dataset):
    layout, _ = dataset
    rescored(layout, entropy=False)
    assert ScoreShards(layout.root).columns == {"ref_loss"}
    rescored(layout, engine=None)
    assert ScoreShards(layout.root).columns == frozenset()


def test_a_shard_of_several_other_settings_names_each(dataset):
    layout, units = dataset
    resettled(layout, units[1], dtype="bfloat16", threads=99)
    with pytest.raises(
        UserError, match=rf"{units[1]}\.parquet: .*scorer\.dtype: .* now; scorer\.threads: .*; delete it"
    ):
        ScoreShards(layout.root)


@pytest.mark.parametrize("messages", ["messages", None])
def test_shards_of_conversations_and_of_texts_are_told_apart(dataset, messages, monkeypatch):
    layout, _ = dataset
    corpus = print_of(layout)["corpus"] | {"messages": messages}
    edit_sealed(layout.dataset, fingerprint=print_of(layout, corpus=corpus))
    monkeypatch.setattr("trainer.data.difference", lambda stored, current: [])
    if messages is None:
        assert not ScoreShards(layout.root).conversations
    else:
        with pytest.raises(UserError, match="is not the shard that its receipt describes"):
            ScoreShards(layout.root)


def named(layout, **names):
    for unit in layout.committed():
        engine = unseal(layout.receipt(unit).read_bytes())["engine"]
        edit_sealed(layout.receipt(unit), engine={**engine, **names})


def test_what_scored_and_what_was_scored_are_known_by_name_where_every_receipt_has_one(dataset):
    layout, units = dataset
    files = print_of(layout)["model"]
    hashes = ", ".join(f"{name} `{files[name][:16]}`" for name in sorted(files))
    assert len(files) > 1 and ScoreShards(layout.root).scored_by == {hashes}
    assert ScoreShards(layout.root).made_of == frozenset()
    named(layout, model="org/reference@1", corpus="org/web@2")
    source = ScoreShards(layout.root)
    assert source.scored_by == {"org/reference@1"} and source.made_of == {"org/web@2"}
    engine = unseal(layout.receipt(units[0]).read_bytes())["engine"]
    edit_sealed(layout.receipt(units[0]), engine={k: v for k, v in engine.items() if k not in ("model", "corpus")})
    source = ScoreShards(layout.root)
    assert source.scored_by == {hashes} and source.made_of == {"org/web@2"}


def test_what_no_model_scored_is_known_by_none(dataset, monkeypatch):
    layout, _ = dataset
    edit_sealed(layout.dataset, fingerprint=print_of(layout, model={}))
    monkeypatch.setattr("trainer.data.difference", lambda stored, current: [])
    assert ScoreShards(layout.root).scored_by == frozenset()


def test_a_dataset_of_no_windows_has_no_order():
    with pytest.raises(UserError, match=r"^the dataset holds no windows; look at it with `tokensift inspect`"):
        next(ordered(made([]), 0, 2, 0))


def test_a_block_is_so_many_of_the_largest_groups_or_all_there_are():
    source = made([5] * 8, size=3)  # groups of 3, 3 and 2
    assert [block_windows(source, groups) for groups in (1, 2, 3, 9)] == [3, 6, 9, 9]
    assert block_windows(made([]), 4) == 0 and block_windows(made([5] * 3, size=1), 2) == 2


def test_a_shard_that_is_damaged_is_named_by_whatever_reads_it(several_groups):
    layout, _ = several_groups
    victim = ScoreShards(layout.root).groups[0].path
    whole = victim.read_bytes()
    victim.write_bytes(whole[:4] + bytes(len(whole) // 3) + whole[4 + len(whole) // 3 :])  # pages, not the footer
    source = ScoreShards(layout.root)
    for read in (lambda: source.read(0), lambda: source.lengths):
        with pytest.raises(UserError, match=rf"{victim.name}.* damaged"):
            read()
    victim.write_bytes(whole)
    pq.write_table(pq.read_table(victim).replace_schema_metadata({b"tokensift": b"{"}), victim)
    edit_sealed(layout.receipt(victim.stem), bytes=victim.stat().st_size)
    with pytest.raises(UserError, match=rf"{victim.name}: damaged metadata"):
        ScoreShards(layout.root)
