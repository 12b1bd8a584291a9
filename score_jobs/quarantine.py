"""Quarantine: how many documents could not be scored, and when that is no longer noise."""

import json
from collections import Counter
from collections.abc import Iterable

from schemas.errors import UserError
from schemas.receipt import Layout, Receipt


def quarantined_share(receipts: Iterable[Receipt]) -> float:
    """Share of all documents that went to quarantine; 0.0 of none.

    Noise of the web is below 0.01; a wrong text column or a model of NaN weights makes 1.0.
    """
    quarantined = documents = 0
    for receipt in receipts:
        quarantined += receipt.quarantined
        documents += receipt.documents + receipt.quarantined
    return quarantined / documents if documents else 0.0


def refuse_quarantine(layout: Layout, receipts: Iterable[Receipt], most: float, least_documents: int = 1) -> None:
    """Raise UserError if more than the share `most` of the documents could not be scored: no corpus is that bad."""
    every = list(receipts)
    quarantined = sum(receipt.quarantined for receipt in every)
    documents = quarantined + sum(receipt.documents for receipt in every)
    if documents < least_documents or quarantined_share(every) <= most:
        return
    reasons: Counter[str] = Counter()
    for receipt in every:
        if receipt.quarantined:
            lines = layout.quarantine(receipt.unit).read_text().splitlines()
            reasons.update(str(json.loads(line)["reason"]) for line in lines)
    reason, count = reasons.most_common(1)[0]
    raise UserError(
        f"{layout.root}: {quarantined} of {documents} documents are in quarantine, {count} of them because: {reason}",
        "mend the corpus, corpus.text or the reference model, delete the dataset and score again;"
        f" or allow more than score.max_quarantined ({most:.0%})",
    )
