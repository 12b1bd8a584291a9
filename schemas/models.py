"""Models and tokenizers: the one place that opens them, with every error that can come of it."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from schemas.errors import UserError

MODEL_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.txt")


def local_model(name: str) -> Path:
    """The folder of a model: `name` itself if it is one, else the Hugging Face hub's snapshot of it.

    Only safetensors weights are fetched; pickled ones are never loaded.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if name.startswith((".", "/")) or name.count("/") > 1:
        raise UserError(f"model `{name}`: no such folder; train it first (`make reference`) or mend the path")
    from huggingface_hub import snapshot_download  # only the hub path needs a network client

    try:
        return Path(snapshot_download(name, allow_patterns=list(MODEL_FILES)))
    except Exception as error:
        raise UserError(f"model `{name}`: neither a local folder nor to be had from the hub: {error}") from error


def open_tokenizer(folder: Path, field: str) -> Any:
    """The fast tokenizer of a model folder. Raises UserError if it has none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{field}: {folder} has no usable tokenizer: {str(error).splitlines()[0]}") from error
