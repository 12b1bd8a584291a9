"""Quarantine: shares are of all documents, and what is refused says why in the words that most documents were given."""

import json
from pathlib import Path

import pytest

from schemas.errors import UserError
from schemas.receipt import Layout, Receipt
from score_jobs.quarantine import Tally, read_reasons, refuse_quarantine

REASONS = {"a": ["empty"], "b": [], "c": ["too long", "empty", "too long"], "d": ["too long"]}


@pytest.fixture
def receipts(tmp_path: Path) -> tuple[Layout, list[Receipt]]:
    """Four units of 5 good documents each, and those of `REASONS` in quarantine."""
    layout = Layout(tmp_path)
    layout.make()
    for unit, reasons in REASONS.items():
        if reasons:  # a unit without any has no file
            lines = [json.dumps({"doc_id": "u", "row": row, "reason": reason}) for row, reason in enumerate(reasons)]
            layout.quarantine(unit).write_text("\n".join(lines) + "\n")
    return layout, [receipt(unit, 5, len(reasons)) for unit, reasons in REASONS.items()]


def receipt(unit: str, documents: int, quarantined: int) -> Receipt:
    return Receipt(
        unit=unit, shard="s", first_document=0, end_document=documents + quarantined, input_hash="h", bytes=1,
        sha256="s", windows=1, tokens=1, documents=documents, quarantined=quarantined, quarantine_sha256=None,
        loss_sum=0.0, loss_count=0, loss_histogram=[0] * 9, engine={}, seconds={},
    )  # fmt: skip


def test_the_share_is_of_documents_that_were_scored_and_that_were_not(receipts: tuple[Layout, list[Receipt]]) -> None:
    tally = Tally.of(receipts[1])
    assert (tally.documents, tally.quarantined, tally.share) == (25, 5, 0.2)
    tally.add(receipt("e", 0, 15))
    assert tally.share == 0.5
    assert Tally.of([]).share == 0.0


def test_reasons_are_those_of_each_document_in_order(receipts: tuple[Layout, list[Receipt]]) -> None:
    assert read_reasons(receipts[0], "c") == REASONS["c"]
    with pytest.raises(FileNotFoundError):
        read_reasons(receipts[0], "b")


def test_a_share_that_is_allowed_passes_and_one_above_is_refused_with_its_commonest_reason(
    receipts: tuple[Layout, list[Receipt]], tmp_path: Path
) -> None:
    layout, found = receipts
    refuse_quarantine(layout, Tally.of(found), found, 0.2)
    refuse_quarantine(layout, Tally.of([]), [], 0.0)
    with pytest.raises(UserError) as caught:
        refuse_quarantine(layout, Tally.of(found), found, 0.19)
    assert f"{tmp_path}: 5 of 25 documents are in quarantine, 3 of them because: too long" == caught.value.problem
    assert all(words in caught.value.fix for words in ("corpus.text", "score.max_quarantined (19%)", "score again"))
