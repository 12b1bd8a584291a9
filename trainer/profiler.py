"""A profile of a few steps: one Chrome trace a rank, for https://ui.perfetto.dev or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainer.ranks import Ranks


class Profiler:
    """Traces steps `window[0]` to `window[1]` (exclusive), counted as `step` in metrics.jsonl; does nothing otherwise.

    Files: `<folder>/steps-<from>-<to>/rank-<number>.json.gz`. Leaving the block writes what there is of a window.
    """

    def __init__(self, folder: Path, window: tuple[int, int] | None, ranks: Ranks):
        self.folder, self.window, self.ranks = folder, window or (0, 0), ranks
        self.trace: profile | None = None
        self.mark: record_function | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.at(self.window[1])

    def at(self, step: int) -> None:
        """Say that a step begins."""
        if self.mark:
            self.mark.__exit__(None, None, None)
            self.mark = None
        inside = self.window[0] <= step < self.window[1]
        if inside and not self.trace:
            cuda = [ProfilerActivity.CUDA] if self.ranks.device.type == "cuda" else []
            self.trace = profile(activities=[ProfilerActivity.CPU, *cuda])
            self.trace.start()
        if self.trace and not inside:
            self._write(self.trace)
            self.trace = None
        if inside:
            self.mark = record_function(f"step {step}")
            self.mark.__enter__()

    def _write(self, trace: profile) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()  # what the last step still has to do belongs to it
        trace.stop()
        folder = self.folder / "steps-{}-{}".format(*self.window)
        folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(folder / f"rank-{self.ranks.rank:05d}.json.gz"))
