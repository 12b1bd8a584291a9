"""Greedy text from any model: one call for Hugging Face and for vLLM, the same tokens in and the same cut of the text.

Prompts are batched by length, and what a completion is does not depend on what lies beside it.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from schemas.config import Context
from schemas.errors import UserError, first_line
from schemas.models import positions
from score_jobs.engines.vllm_offline import set_environment

LONGEST = 8192  # tokens of prompt and completion that vLLM sets memory aside for


class Generator(Protocol):
    """Whatever completes prompts."""

    def complete(self, prompts: list[str], stop: list[str], new_tokens: int) -> list[str]:
        """The likeliest next token again and again, prompt by prompt, until the model ends, a `stop` or `new_tokens`.

        A completion begins where its prompt ends and holds no stop string. A prompt that leaves no room within the
        model's positions is completed by nothing.
        """
        ...


class Speller:
    """Prompts as token ids and completions as text, by the rules of one tokenizer."""

    def __init__(self, tokenizer: Any, bos: bool, ends: set[int]):
        """`bos`: windows begin with the tokenizer's own first token. `ends`: tokens by which the model says it is done."""
        self.tokenizer, self.ends = tokenizer, ends
        self.head = [tokenizer.bos_token_id] if bos else []

    def ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt, `bos` first where windows have it."""
        return self.head + self.tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def text(self, prompt: list[int], ids: list[int], stop: list[str]) -> str:
        """What tokens `ids` after a prompt say, up to the model's end or the first stop string.

        The prompt's last token is spelt with them: some tokenizers drop a space at the beginning of what they spell.
        """
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        before = self._spell(prompt[-1:])
        found = self._spell(prompt[-1:] + ids[:end])[len(before) :]
        return found[: min((place for mark in stop if (place := found.find(mark)) >= 0), default=len(found))]

    def _spell(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class HuggingFace:
    """Completes prompts with a model that `open_model` opened, on the device where it lies."""

    def __init__(self, module: Any, tokenizer: Any, context: Context, limit: int | None, batch_tokens: int):
        """`limit`: most tokens of prompt and completion (None: no limit). `batch_tokens`: of all rows of a batch."""
        self.module, self.limit, self.batch_tokens = module, limit, batch_tokens
        self.speller = Speller(tokenizer, context.bos, ends_of(module.generation_config, tokenizer))

    @torch.no_grad()
    def complete(self, prompts: list[str], stop: list[str], new_tokens: int) -> list[str]:
        """As `Generator` says."""
        ids = [self.speller.ids(prompt) for prompt in prompts]
        texts = [""] * len(prompts)
        for members, room in batches(list(map(len, ids)), new_tokens, self.limit, self.batch_tokens):
            found = self._continue([ids[member] for member in members], stop, room)
            for member, said in zip(members, found, strict=True):
                texts[member] = self.speller.text(ids[member], said, stop)
        return texts

    def _continue(self, prompts: list[list[int]], stop: list[str], room: int) -> list[list[int]]:
        width = max(map(len, prompts))
        pads = [width - len(prompt) for prompt in prompts]  # on the left: all rows go on at one column
        device = self.module.device
        ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)], device=device)
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=device)
        ends = sorted(self.speller.ends)
        # What a model's own generation_config asks for beyond the likeliest token is set aside by name.
        settings = GenerationConfig(
            max_new_tokens=room, do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50,
            repetition_penalty=1.0, no_repeat_ngram_size=0, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
        )  # fmt: skip
        seen = StoppingCriteriaList([Said(self.speller.tokenizer, stop, width)] if stop else [])
        found = self.module.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=seen
        )
        return found[:, width:].tolist()


class Said(StoppingCriteria):
    """Whether the newest token of a row has finished one of the stop strings."""

    def __init__(self, tokenizer: Any, stop: list[str], start: int):
        """`start`: the column of the first new token."""
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        self.tail = max(len(mark.encode()) for mark in stop) + 1  # a token is a byte at least

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Bool [rows]."""
        tails = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        found = [any(mark in text for mark in self.stop) for text in texts]
        return torch.tensor(found, device=input_ids.device)


class Vllm:
    """Completes prompts with vLLM, which is installed in an environment of its own: run the command by that one."""

    def __init__(self, folder: Path, tokenizer: Any, context: Context, dtype: str = "float32"):
        """Load the model, for texts of at most `LONGEST` tokens. Raises UserError where vLLM is not or cannot load it."""
        self.limit = min(positions(folder, "model") or LONGEST, LONGEST)
        self.model = load_by_vllm(_import_llm, folder, dtype, self.limit)
        from vllm import SamplingParams

        self._settings = SamplingParams
        saved = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None
        self.speller = Speller(tokenizer, context.bos, ends_of(saved, tokenizer))

    def complete(self, prompts: list[str], stop: list[str], new_tokens: int) -> list[str]:
        """As `Generator` says."""
        ids = [self.speller.ids(prompt) for prompt in prompts]
        rooms = [room_of(len(prompt), new_tokens, self.limit) for prompt in ids]
        asked = [member for member, room in enumerate(rooms) if room]
        settings = [
            self._settings(temperature=0, max_tokens=rooms[member], stop=stop, stop_token_ids=sorted(self.speller.ends))
            for member in asked
        ]
        outputs = self.model.generate([{"prompt_token_ids": ids[member]} for member in asked], settings, use_tqdm=False)
        texts = [""] * len(prompts)
        for member, output in zip(asked, outputs, strict=True):
            texts[member] = self.speller.text(ids[member], list(output.outputs[0].token_ids), stop)
        return texts


def _import_llm() -> Any:
    from vllm import LLM

    return LLM


def load_by_vllm(imported: Callable[[], Any], folder: Path, dtype: str, longest: int) -> Any:
    """A model in vLLM, in this process, for texts of at most `longest` tokens; `imported` gives the class that wraps it.

    Raises UserError where vLLM is not installed, or cannot load the model.
    """
    set_environment(beyond=False)
    try:
        wrapper = imported()
    except ImportError as error:
        raise UserError(
            f"--backend vllm: vllm cannot be imported ({first_line(error)})",
            "`make vllm` builds an environment that has it: run .venv-vllm/bin/tokensift",
        ) from error
    try:
        return wrapper(
            str(folder), dtype=dtype, load_format="safetensors", max_model_len=longest, seed=0,
            enforce_eager=not torch.cuda.is_available(), enable_prefix_caching=False, async_scheduling=False,
        )  # fmt: skip
    except Exception as error:  # vllm raises what the model's code, its own checks and CUDA raise
        raise UserError(
            f"model: {folder} cannot be loaded by vllm ({first_line(error)})", "use --backend hf"
        ) from error


def ends_of(settings: GenerationConfig | None, tokenizer: Any) -> set[int]:
    """Tokens that end a completion: those of the model's generation config and the tokenizer's own."""
    named = getattr(settings, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


def room_of(length: int, new_tokens: int, limit: int | None) -> int:
    """Tokens that may follow a prompt of `length` tokens; none follow no token."""
    return 0 if not length else new_tokens if limit is None else max(0, min(new_tokens, limit - length))


def batches(
    lengths: list[int], new_tokens: int, limit: int | None, batch_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Prompts of lengths [prompts] that run together, with the new tokens they may have; those without room are left out.

    The longest come first, so that what does not fit into memory fails at once. A batch holds at most `batch_tokens`
    with its completions, or one prompt; all its prompts have equal room, lest a neighbour cut a completion short.
    """
    rooms = [room_of(length, new_tokens, limit) for length in lengths]
    order = sorted((member for member, room in enumerate(rooms) if room), key=lambda member: -lengths[member])
    for room, group in groupby(order, key=lambda member: rooms[member]):
        members = list(group)
        while members:
            count = max(1, batch_tokens // (lengths[members[0]] + room))
            yield members[:count], room
            members = members[count:]
