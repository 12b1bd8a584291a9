"""Quarantine: how many documents could not be scored, and when that is no longer noise."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from schemas.errors import UserError
from schemas.receipt import Layout, Receipt


@dataclass
class Tally:
    """Documents of some units, kept up as units are done: a look at every receipt for each would grow with their square."""

    documents: int = 0
    quarantined: int = 0

    def add(self, receipt: Receipt) -> None:
        """Count one unit more."""
        self.quarantined += receipt.quarantined
        self.documents += receipt.documents + receipt.quarantined

    @property
    def share(self) -> float:
        """Share of all documents that went to quarantine; 0.0 of none.

        Noise of the web is below 0.01; a wrong text column or a model of NaN weights makes 1.0.
        """
        return self.quarantined / self.documents if self.documents else 0.0

    @classmethod
    def of(cls, receipts: Iterable[Receipt]) -> "Tally":
        """The count of these units."""
        tally = cls()
        for receipt in receipts:
            tally.add(receipt)
        return tally


def read_reasons(layout: Layout, unit: str) -> list[str]:
    """Why each quarantined document of a unit could not be scored. Raises what a file that is gone or damaged does."""
    lines = layout.store.read(layout.name(layout.QUARANTINE, unit)).splitlines()
    return [str(json.loads(line)["reason"]) for line in lines]


def refuse_quarantine(layout: Layout, tally: Tally, receipts: Iterable[Receipt], most: float) -> None:
    """Raise UserError if more than the share `most` of the documents counted in `tally` could not be scored.

    `receipts` are those that were counted: they lead to the reasons.
    """
    if tally.share <= most:
        return
    reasons: Counter[str] = Counter()
    for receipt in receipts:
        if receipt.quarantined:
            reasons.update(read_reasons(layout, receipt.unit))
    reason, count = reasons.most_common(1)[0]
    raise UserError(
        f"{layout.root}: {tally.quarantined} of {tally.documents} documents are in quarantine, {count} of them because: {reason}",
        "mend the corpus, corpus.text or the reference model, delete the dataset and score again;"
        f" or allow more than score.max_quarantined ({most:.0%})",
    )
