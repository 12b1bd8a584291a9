"""Reference losses by vLLM, for reference models that one GPU cannot hold or that vLLM alone runs.

vLLM allocates a key-value cache that scoring never reads again and samples one token a window that is thrown away.
Its losses are the packed engine's, and equal work gives equal bytes: the scheduler runs in this process and batches
what it is given, in order, whatever the time.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from schemas.errors import UserError, first_line
from schemas.models import positions, refuse_long_windows
from score_jobs.engines import Scored

SEQUENCES = 256  # of one step, at most; vLLM's own default depends on the card's memory, and the batches would with it
# As in the packed engine: bfloat16 logits alone would be wrong by some hundredths of a nat.
OVERRIDES = {"head_dtype": "float32"}
GPU_MEMORY = 0.9  # of the worker's share of a card: weights and key-value cache


class VllmEngine:
    """Computes reference losses of windows with vLLM: on one device in this process, on several in one child each."""

    def __init__(self, model: Path, window: int, dtype: str, batch_tokens: int, gpus: float, entropy: bool = False):
        """Load the model; `gpus` above one is the degree of tensor parallelism. Raises UserError if it cannot run."""
        if entropy:
            raise UserError("score.entropy: the vllm engine gives losses only; set it to false, or score.engine: hf")
        limit = positions(model, "score.model")
        refuse_long_windows(limit, window, model)
        set_environment(beyond=limit == window)
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"score.engine: vllm cannot be imported ({error})",
                "`make vllm` builds an environment that has it: set score.python: .venv-vllm/bin/python",
            ) from error
        try:
            self.model: Any = LLM(
                model=str(model),
                dtype=dtype,
                hf_overrides=OVERRIDES,
                load_format="safetensors",
                skip_tokenizer_init=True,
                max_model_len=window + 1,  # room for the one token that vLLM must sample
                max_num_batched_tokens=max(batch_tokens, window + 1),
                max_num_seqs=SEQUENCES,
                tensor_parallel_size=max(1, int(gpus)),
                # vLLM would otherwise ask Ray, in whose actor we are, for GPUs that the actor already holds.
                distributed_executor_backend="mp" if gpus > 1 else "uni",
                gpu_memory_utilization=GPU_MEMORY * min(gpus or 1, 1),
                enable_prefix_caching=False,
                async_scheduling=False,
                enforce_eager=not gpus,
                seed=0,
            )
        except Exception as error:  # vllm raises what the model's code, its own checks and CUDA raise
            raise UserError(
                f"score.model: {model} cannot be loaded by vllm ({_useful_line(error)})",
                "mend the model or the setting it names, or set score.engine: hf",
            ) from error
        self._settings = SamplingParams
        runner = getattr(self.model.llm_engine.vllm_config, "use_v2_model_runner", False)
        self.by_token = bool(runner) and hasattr(SamplingParams, "prompt_logprob_token_ids")

    def score(self, windows: Sequence[np.ndarray]) -> list[Scored]:
        """Losses of each window: float32 [length] in nats, NaN at position 0."""
        results = [np.full(len(window), np.nan, dtype=np.float32) for window in windows]
        scored = [index for index, window in enumerate(windows) if len(window) > 1]
        prompts: list[Any] = [{"prompt_token_ids": windows[index].tolist()} for index in scored]
        settings = [self._ask(windows[index]) for index in scored]
        outputs = self.model.generate(prompts, settings, use_tqdm=False)
        read = _by_token if self.by_token else _by_position
        for index, output in zip(scored, outputs, strict=True):
            results[index][1:] = -read(output, windows[index])
        return [Scored(loss=losses) for losses in results]

    def describe(self) -> dict[str, Any]:
        """What a receipt says of the engine."""
        return {"name": "vllm", "log_probabilities": "by token" if self.by_token else "by position"}

    def _ask(self, window: np.ndarray) -> Any:
        """Sampling parameters: one token that nobody reads, and the log-probability of each token of the prompt."""
        if self.by_token:
            wanted: dict[str, Any] = {"prompt_logprob_token_ids": window[1:, None].astype(np.int32)}
        else:
            wanted = {"prompt_logprobs": 0, "flat_logprobs": True}
        return self._settings(max_tokens=1, temperature=0, detokenize=False, **wanted)


def set_environment(beyond: bool) -> None:
    """Settings that vLLM takes from the environment alone, read when it is imported or a model is loaded."""
    # A scheduler in a process of its own would batch by what has arrived so far, and bytes would depend on timing.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # The sampled token of a window as long as the model's positions has a position of its own beyond them. It is never
    # computed: a request ends with its `max_tokens`, before the token would be fed back.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1" if beyond else "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # On CPUs: GiB of key-value cache (the default is most of the memory, for each worker), and as many threads as the
    # config says, not bound to cores: several workers would be bound to the same.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def _by_token(output: Any, window: np.ndarray) -> np.ndarray:
    """Log-probabilities [length - 1] where vLLM (from 0.32 on, model runner V2) was asked for the tokens themselves.

    It drops the scores of a request whose first rows it did not compute, and says so by their absence alone.
    """
    rows = output.prompt_token_id_logprobs
    if rows is None or np.shape(rows) != (len(window) - 1, 1):
        found = "none" if rows is None else f"shape {np.shape(rows)}"
        raise RuntimeError(f"vllm gave log-probabilities of {found} for a window of {len(window)} tokens")
    return np.asarray(rows, dtype=np.float32)[:, 0]


def _by_position(output: Any, window: np.ndarray) -> np.ndarray:
    """Log-probabilities [length - 1] from flat lists: the prompt's own token is the first of each position."""
    flat = output.prompt_logprobs
    starts = np.asarray(flat.start_indices[1 : len(window)])
    if len(flat.start_indices) != len(window) or not np.array_equal(np.asarray(flat.token_ids)[starts], window[1:]):
        raise RuntimeError(f"vllm gave log-probabilities of other tokens than the {len(window)} it was given")
    return np.asarray(flat.logprobs, dtype=np.float32)[starts]


def _useful_line(error: Exception) -> str:
    """What went wrong: a pydantic error's first line only counts its errors."""
    return str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else first_line(error)
