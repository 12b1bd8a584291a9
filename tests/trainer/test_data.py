"""Law 12 and the gate of stage 2: a score dataset is whole, of one setting, and every shard is its receipt's."""

import shutil

import pytest

from schemas.errors import UserError
from schemas.receipt import Layout
from tests.helpers import edit_sealed
from trainer.data import ScoreShards

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
    with pytest.raises(UserError, match=rf"not come to its end \({len(units)} units so far\); .*train\.partial: true"):
        ScoreShards(layout.root)
    assert windows(ScoreShards(layout.root, partial=True)) > 0


def test_a_unit_without_its_receipt_is_missed_and_its_shard_is_never_read(dataset):
    layout, units = dataset
    whole = ScoreShards(layout.root)
    layout.receipt(units[0]).unlink()
    with pytest.raises(UserError, match=rf"1 of {len(units)} units have no receipt, first {units[0]}"):
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
    with pytest.raises(UserError, match="1 units are not part of the dataset that was scored, first stranger"):
        ScoreShards(layout.root, partial)


def test_one_shard_under_two_names_is_refused(dataset):
    layout, units = dataset
    layout.complete.unlink()  # else the stranger alone would be refused
    shutil.copy(layout.shard(units[0]), layout.shard("twin"))
    shutil.copy(layout.receipt(units[0]), layout.receipt("twin"))
    edit_sealed(layout.receipt("twin"), unit="twin", shard="units/twin.parquet")
    with pytest.raises(UserError, match=r"twin\.parquet: is not the shard that its receipt describes"):
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
    with pytest.raises(UserError, match=rf"{units[0]}\.parquet: missing or not the {size + change} bytes"):
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
