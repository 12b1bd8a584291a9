"""Quarantine: how many documents could not be scored, and when that is no longer noise."""

from collections.abc import Iterable

from schemas.receipt import Receipt


def quarantined_share(receipts: Iterable[Receipt]) -> float:
    """Share of all documents that went to quarantine; 0.0 of none.

    Noise of the web is below 0.01; a wrong text column or a model of NaN weights makes 1.0.
    """
    quarantined = documents = 0
    for receipt in receipts:
        quarantined += receipt.quarantined
        documents += receipt.documents + receipt.quarantined
    return quarantined / documents if documents else 0.0
