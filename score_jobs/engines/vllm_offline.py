"""Reference losses by vLLM, for reference models that one GPU cannot hold or that vLLM alone runs.

Slower here than the packed engine: vLLM allocates a key-value cache that scoring never reads again, samples one
token a window that is thrown away, and hands losses over as Python objects. The losses are the same.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from schemas.errors import UserError, first_line
from score_jobs.engines import Scored


class VllmEngine:
    """Computes reference losses of windows with vLLM, in this process."""

    def __init__(self, model: Path, window: int, dtype: str, batch_tokens: int, gpus: float, entropy: bool = False):
        """Load the model; `gpus` above one is the degree of tensor parallelism. Raises UserError if it cannot run."""
        if entropy:
            raise UserError("score.entropy: the vllm engine gives losses only; set it to false, or score.engine: hf")
        # A scheduler in a process of its own would batch by what has arrived so far, and bytes would depend on timing.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"score.engine: vllm cannot be imported ({error}); pip install 'tokensift[vllm]'"
            ) from error
        try:
            self.model: Any = LLM(
                model=str(model),
                dtype=dtype,
                skip_tokenizer_init=True,
                max_model_len=window + 1,  # the one token that vLLM must generate
                max_num_batched_tokens=max(batch_tokens, window + 1),
                tensor_parallel_size=max(1, int(gpus)),
                gpu_memory_utilization=0.9 if gpus else 0.2,
                enable_prefix_caching=False,
                enforce_eager=not gpus,
                seed=0,
            )
        except Exception as error:  # vllm raises what the model's code, its own checks and CUDA raise
            raise UserError(
                f"score.model: {model} cannot be loaded by vllm ({_useful_line(error)})",
                "mend the model or the setting it names, or set score.engine: hf",
            ) from error
        self.settings = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )

    def score(self, windows: Sequence[np.ndarray]) -> list[Scored]:
        """Losses of each window: float32 [length] in nats, NaN at position 0."""
        results = [np.full(len(window), np.nan, dtype=np.float32) for window in windows]
        scored = [index for index, window in enumerate(windows) if len(window) > 1]
        prompts: list[Any] = [{"prompt_token_ids": windows[index].tolist()} for index in scored]
        outputs = self.model.generate(prompts, self.settings, use_tqdm=False)
        for index, output in zip(scored, outputs, strict=True):
            flat, length = output.prompt_logprobs, len(windows[index])
            # Position 0 is an empty range; each other one holds the prompt's own token first, and no more.
            starts = np.asarray(flat.start_indices[1:length])
            if not np.array_equal(np.asarray(flat.token_ids)[starts], windows[index][1:]):
                raise RuntimeError(f"vllm gave log-probabilities of other tokens than the {length} it was given")
            results[index][1:] = -np.asarray(flat.logprobs, dtype=np.float32)[starts]
        return [Scored(loss=losses) for losses in results]

    def describe(self) -> dict[str, Any]:
        """What a receipt says of the engine."""
        return {"name": "vllm"}


def _useful_line(error: Exception) -> str:
    """What went wrong: a pydantic error's first line only counts its errors."""
    return str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else first_line(error)
