"""The scoring job: what is to be scored, and whether it may be added to what is there. Ray is driven by the pool."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from schemas.config import Config, Score
from schemas.conversation import templated
from schemas.errors import UserError
from schemas.fingerprint import dataset_fingerprint, difference
from schemas.lock import locked
from schemas.models import local_model, open_tokenizer
from schemas.receipt import Layout, Receipt, read_dataset, read_receipts, write_complete, write_dataset
from score_jobs.inputs import ShardError
from score_jobs.plan import Plan, Unit, plan
from score_jobs.progress import Heart, Progress
from score_jobs.quarantine import Tally, refuse_quarantine
from score_jobs.survey import Surveyed, survey_here
from score_jobs.worker import Job

EARLY_DOCUMENTS = 500  # after so many a job of broken losses is stopped, not only at its end


@dataclass
class Outcome:
    """The end of a job: receipts of the whole dataset, what is missing, one line each, and how many units were left."""

    receipts: dict[str, Receipt]
    new_tokens: int = 0
    missing: list[str] = field(default_factory=list)
    left: int = 0


def score(
    config: Config, report: Callable[[Progress], None] = lambda progress: None, limit: int | None = None
) -> Outcome:
    """Score what has no receipt yet, at most `limit` units. A finished dataset is left untouched.

    SIGTERM is a KeyboardInterrupt. Raises UserError for settings that differ from the dataset's, a corpus whose shards
    changed (law 3), a cluster that goes away, and too many documents in quarantine.
    """
    layout = Layout(config.score.output)
    layout.make()
    with locked(layout.root, "`make score`"):
        job, progress = prepare(config, layout), Progress()
        write_dataset(layout, job.fingerprint)
        inventory = layout.root / layout.INVENTORY

        def surveyed(done: int, total: int) -> None:
            progress.note = f"survey, {done} of {total} shards"
            report(progress)

        surveyor = survey_here if config.score.address is None else partial(_survey_there, config.score)
        planned = plan(config.corpus, job.fingerprint, config.score.unit_bytes, inventory, surveyed, surveyor)
        receipts = read_receipts(layout)
        _refuse_changed_corpus(layout, receipts, planned)
        missing = [unit for unit in planned.units if unit.name not in receipts]
        todo = missing[:limit]
        outcome = Outcome(receipts, missing=list(planned.broken), left=len(missing) - len(todo))
        if todo:
            layout.sweep()
            _score_units(job, layout, planned, todo, outcome, progress, report)
            layout.sweep()  # what workers that died on the way left half written
        refuse_quarantine(layout, Tally.of(receipts.values()), receipts.values(), config.score.max_quarantined)
        if not outcome.missing and not outcome.left:
            write_complete(layout, [unit.name for unit in planned.units])
        return outcome


def _survey_there(score: Score, urls: list[str], found: Callable[[str, Surveyed | ShardError], None]) -> None:
    from score_jobs.pool import survey_on_cluster  # Ray, which a corpus that did not change does not need

    survey_on_cluster(score, urls, found)


def _score_units(
    job: Job,
    layout: Layout,
    planned: Plan,
    todo: list[Unit],
    outcome: Outcome,
    progress: Progress,
    report: Callable[[Progress], None],
) -> None:
    """Hand units to the pool; receipts go into `outcome` as they come."""
    if job.score.address is None:
        # Read when Ray is imported: a Ray for this machine alone then listens on the loopback interface alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from score_jobs.pool import Pool  # Ray, which a finished dataset does not need

    progress.plan(planned.units, outcome.receipts, todo)
    tally = Tally.of(outcome.receipts.values())
    pool = Pool(job, todo, next((receipt.canary for receipt in outcome.receipts.values() if receipt.canary), []))
    heart = Heart(layout)

    def finished(unit: Unit, receipt: Receipt) -> None:
        outcome.receipts[unit.name] = receipt
        outcome.new_tokens += receipt.tokens
        progress.add(unit, receipt)
        tally.add(receipt)
        if tally.documents >= EARLY_DOCUMENTS:
            refuse_quarantine(layout, tally, outcome.receipts.values(), job.score.max_quarantined)

    def waited(note: str) -> None:
        progress.see(note, workers=pool.workers, in_flight=pool.in_flight, retries=pool.retries)
        heart.beat(progress)
        report(progress)

    try:
        outcome.missing += pool.run(finished, waited)
    finally:
        progress.see("end", workers=0, in_flight=0, retries=pool.retries)
        heart.beat(progress, last=True)


def prepare(config: Config, layout: Layout) -> Job:
    """Everything of a job that is no unit. Raises UserError for what is wrong with the model or the dataset (law 3)."""
    model = local_model(config.score.model, "score.model")
    tokenizer = templated(open_tokenizer(model, "score.model"), config.corpus)
    fingerprint = dataset_fingerprint(tokenizer, model, config.corpus, config.context, config.score)
    if layout.dataset.exists():
        changed = difference(read_dataset(layout), fingerprint)
        if changed:
            raise UserError(
                f"{layout.dataset}: these scores were made with other settings:\n  " + "\n  ".join(changed),
                "restore them or give a new score.output",
            )
    elif layout.committed():
        raise UserError(f"{layout.dataset}: missing while receipts exist", "restore it or give a new score.output")
    # Absolute, since workers start where `ray start` was typed.
    score = config.score.model_copy(update={"output": config.score.output.absolute()})
    corpus = config.corpus
    if corpus.messages:  # workers elsewhere may not have the file
        corpus = corpus.model_copy(update={"template": tokenizer.get_chat_template()})
    return Job(model.absolute(), corpus, config.context, score, fingerprint)


def _refuse_changed_corpus(layout: Layout, receipts: dict[str, Receipt], planned: Plan) -> None:
    names = {unit.name for unit in planned.units}
    foreign = [receipt for name, receipt in receipts.items() if name not in names]
    now = {unit.url.rsplit("/", 1)[-1]: unit.input_hash for unit in planned.units}
    lines = sorted(
        {
            f"{item.shard}: input hash {item.input_hash} scored, {now.get(item.shard, 'no such shard or unreadable')} now"
            for item in foreign
        }
    )
    if lines:
        raise UserError(
            f"{layout.root}: the corpus changed since it was scored (adding shards is fine, changing them is not):\n  "
            + "\n  ".join(lines),
            "restore it or give a new score.output",
        )
