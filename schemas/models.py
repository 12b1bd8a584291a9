"""Models and tokenizers: the one place that opens them, with every error that can come of it.

Loading is exact: a weight that is missing, unexpected or of another shape is an error, never a random layer. Isolation
is proven on the model itself (`schemas.probe`), so no family is scored or trained on trust.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import RevisionNotFoundError, StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hub_logging

from schemas.errors import UserError, first_line
from schemas.forward import Opened
from schemas.hub import split
from schemas.probe import prove
from schemas.product import by_onednn

MOST_LAYERS = 10_000  # a damaged config of more would fill all memory before its weights are looked at
MODEL_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.txt")


def open_model(
    folder: Path,
    field: str,
    window: int,
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    dropout: bool = False,
) -> Opened:
    """Load a causal language model exactly and prove how its windows can be kept apart.

    `field` is the config's name for it, `window` the longest window in tokens, `dtype` the parameters'. Dropout stays
    off, in training too, unless asked for: tokens would else be ranked by noisy losses. Float32 products on a CPU are
    those of `schemas.product`. Raises UserError for a folder that is no whole model, a window beyond the model's
    positions, and a model whose windows cannot be kept apart.
    """
    module = _load(folder, field, dtype)
    limit = _positions(module.config.get_text_config())
    refuse_long_windows(limit, window, folder)
    module.to(device).eval()
    fast = dtype == (compute or dtype) and by_onednn(dtype, device)
    opened = prove(module, compute or dtype, window, f"{field}: {folder}", onednn=fast)
    module.train(dropout)
    return opened


def _load(folder: Path, field: str, dtype: torch.dtype) -> Any:
    if not (folder / "config.json").exists():
        raise UserError(f"{field}: {folder} has no config.json, so it is not a model", "name a Hugging Face folder")
    if any(folder.glob("rank-*.safetensors")):
        raise UserError(
            f"{field}: {folder} is a checkpoint of a training run", "`tokensift export` makes a model of it"
        )
    layers = getattr(_text_config(folder, field), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise UserError(f"{field}: {folder}/config.json: num_hidden_layers: {layers} is no model's", "mend it")
    loud = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # what its load report warns of is an error of ours
    hub_logging.disable_progress_bar()
    try:
        # Attention is SDPA where the family has it; asking for it by name would refuse Gemma 2.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
        module, report = loaded
    except Exception as error:  # what a folder's files make transformers raise has no common base
        raise UserError(f"{field}: {folder} cannot be loaded ({_reason(error)})", "mend or convert it") from error
    finally:
        hub_logging.set_verbosity(loud)
    wrong = [
        f"{len(report[kind])} {word} ({', '.join(sorted(map(str, report[kind]))[:3])})"
        for kind, word in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unexpected"),
            ("mismatched_keys", "of another shape"),
            ("error_msgs", "not to be loaded"),
        )
        if report[kind]
    ]
    if wrong:
        raise UserError(
            f"{field}: {folder} does not hold the weights its config.json describes: {'; '.join(wrong)}",
            "fetch or save the model again; a layer without its weights would be random",
        )
    return module


def local_model(name: str, field: str = "model", fetch: bool = True) -> Path:
    """The folder of a model: `name` itself if it is one, else the Hugging Face hub's snapshot of `org/name@revision`.

    Only safetensors weights are fetched; pickled ones are never loaded. Without `fetch` it is taken from the hub's cache
    alone. Raises UserError if it cannot be had.
    """
    folder = Path(name)
    if name and folder.is_dir():
        return folder
    try:
        if folder.exists():
            raise ValueError(f"`{name}` is a file")
        repository, revision = split(name)
    except ValueError as error:
        raise UserError(
            f"{field}: `{name}`: no such folder", "train it first (`make reference`) or mend the path"
        ) from error
    from huggingface_hub import snapshot_download  # only the hub path needs a network client

    try:
        found = snapshot_download(
            repository, revision=revision, allow_patterns=list(MODEL_FILES), local_files_only=not fetch
        )
        return Path(found)
    except RevisionNotFoundError as error:
        raise UserError(f"{field}: `{name}`: {repository} has no such revision", "mend what follows the @") from error
    except Exception as error:  # the hub's client raises what its network stack raises
        raise UserError(
            f"{field}: `{name}` is neither a local folder nor to be had from the hub ({first_line(error)})",
            "mend the path or the network",
        ) from error


def open_tokenizer(folder: Path, field: str) -> Any:
    """The fast tokenizer of a folder.

    Raises UserError if it has none that works, or if the model beside it has no embedding for some of its tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a", add_special_tokens=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged tokenizer.json
        raise UserError(
            f"{field}: {folder} has no usable tokenizer ({_reason(error)})", "copy the model's tokenizer files there"
        ) from error
    if (folder / "config.json").exists():
        _check_vocabulary(folder, tokenizer, field)
    return tokenizer


def _check_vocabulary(folder: Path, tokenizer: Any, field: str) -> None:
    size = getattr(_text_config(folder, field), "vocab_size", None)
    if size is not None and size < len(tokenizer):
        raise UserError(
            f"{field}: {folder} knows {size} tokens, its tokenizer makes {len(tokenizer)}",
            "use the tokenizer that the model was trained with",
        )


def refuse_long_windows(limit: int | None, window: int, folder: Path) -> None:
    """Raise UserError if windows are longer than a model's positions (`limit`; None: it has no end of them)."""
    if limit is not None and limit < window:
        raise UserError(f"context.window: {window} is more than the {limit} positions of {folder}", "lower it")


def positions(folder: Path, field: str) -> int | None:
    """Most tokens that a model attends over, None if its config names no limit. Raises UserError if it has no config."""
    return _positions(_text_config(folder, field))


def _positions(config: Any) -> int | None:
    limit = getattr(config, "max_position_embeddings", None)
    return limit if limit and limit > 0 else None


def _text_config(folder: Path, field: str) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception as error:  # as above
        raise UserError(f"{field}: {folder}/config.json cannot be read ({_reason(error)})", "mend it") from error


def _reason(error: BaseException) -> str:
    """What a library says, in one line; its config validation says why in the error's cause alone."""
    cause = f" {first_line(error.__cause__)}" if isinstance(error, StrictDataclassError) and error.__cause__ else ""
    return first_line(error) + cause
