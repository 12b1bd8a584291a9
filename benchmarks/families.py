"""Every causal family of the installed transformers: how it keeps windows apart, and whether its losses are right.

    python -m benchmarks.families --write docs/families.md

Each family is built tiny and random, opened as both stages open a model, and its losses of windows that share batches are
held against the model's own plain forward of each window alone. Takes some minutes on two CPU cores.
"""

import shutil
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.peer import one_window
from schemas.batch import collate, renumbered
from schemas.errors import UserError
from schemas.forward import Opened
from schemas.loss import batch_losses
from schemas.models import open_model
from trainer.live import Live

WINDOW, VOCABULARY, LAYERS, SECONDS = 48, 128, 4, 60
LENGTHS = (48, 1, 17, 30, 2, 2, 5, 31, 9, 40, 3, 8, 1, 24)
# A random hrm_text, which runs its layers over and over, makes 1.03e-3 of float32 rounding; in float64 packed and alone
# differ by 1e-15. Windows that do see each other differ by 0.1 nats and more.
TOLERANCE_NATS = 3e-3
MOST_PARAMETERS = 20_000_000
ROWS_A_BATCH = 3
# Sizes by the names that configs give them; what a family lacks is left out.
SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (VOCABULARY, ("vocab_size", "vocab_size_per_layer_input", "target_vocab_size")),
    (64, ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "intermediate_size", "ffn_dim",
         "d_ff", "n_inner", "shared_expert_intermediate_size", "ffn_hidden_size", "lru_width", "encoder_ffn_dim",
         "decoder_ffn_dim", "attention_hidden_size", "mlp_hidden_size", "expert_hidden_size", "shared_intermediate_size")),
    (32, ("moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "time_step_rank", "hidden_size_per_layer_input")),
    (LAYERS, ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks",
             "num_experts", "n_routed_experts", "num_local_experts", "num_attention_heads", "n_head", "n_heads", "num_heads",
             "decoder_attention_heads", "encoder_attention_heads", "moe_num_experts", "linear_num_value_heads", "num_mem_blocks",
             "mamba_n_heads", "mamba_num_heads", "linear_conv_kernel_dim", "conv_kernel", "conv_size")),
    (2, ("num_experts_per_tok", "num_key_value_heads", "moe_topk", "top_k_experts", "linear_num_key_heads", "moe_k")),
    (1, ("n_groups", "n_group", "topk_group", "mamba_n_groups", "first_k_dense_replace", "num_kv_shared_layers", "n_shared_experts")),
    (16, ("head_dim", "v_head_dim", "qk_nope_head_dim", "attention_head_dim", "linear_key_head_dim", "linear_value_head_dim",
         "state_size", "d_state", "mamba_d_state", "ssm_state_size", "kv_channels", "global_head_dim")),
    (8, ("qk_rope_head_dim", "sliding_window", "attention_chunk_size", "local_attention_window", "attention_window_size")),
    (128, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "context_length")),
)  # fmt: skip
SPECIAL = {"mamba_d_head": 32, "mamba_head_dim": 32, "mamba_expand": 2, "chunk_size": 16, "mamba_chunk_size": 16}
# Where a family's sizes must fit each other, or its config leaves one to be named.
FITTING: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 128},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"n_mamba_heads": 2, "attention_hidden_size": 128, "attention_head_dim": 32},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "marian": {"decoder_vocab_size": VOCABULARY},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
}
# Settings of a family that decide how its windows may be kept apart, walked beside its defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    **{
        f"{family} as decoder": {"is_decoder": True}
        for family in ("bert", "big_bird", "electra", "rembert", "roberta", "roformer", "xlm-roberta")
    },
    "falcon with ALiBi": {"alibi": True},
    "gemma3_text seeing both ways": {"use_bidirectional_attention": True},
    "llama with dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "phi3 with longrope beyond 5": {
        "original_max_position_embeddings": 5,
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 5,
        },
    },
    "qwen2 with a sliding window": {"use_sliding_window": True, "max_window_layers": 0},
    "xlm as decoder": {"causal": True},
}
WALK = (*sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *VARIANTS)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a family. `nats`: worst difference from the window alone, in scoring and in training."""

    family: str
    model: str
    way: str  # varlen, packed, alone, refused, not built, wrong
    linear: bool | None = None
    nats: float = 0.0
    why: str = ""


def tiny_config(name: str) -> Any:
    """A family's own config, or a variant's, made small. Raises whatever the family raises if it cannot be."""
    family, variant = name.split()[0], VARIANTS.get(name, {})
    kind: Any = CONFIG_MAPPING[family]
    default = kind().to_dict()
    sizes = {name: size for size, names in SIZES for name in names} | SPECIAL
    small: dict[str, Any] = {name: size for name, size in sizes.items() if isinstance(default.get(name), int)}
    if default.get("num_key_value_heads") == default.get("num_attention_heads"):
        small |= {"num_key_value_heads": LAYERS} if "num_key_value_heads" in small else {}
    for name, value in default.items():
        if isinstance(value, int) and name not in small and not name.endswith("_id"):
            if value > VOCABULARY:
                small[name] = 64
            elif value > LAYERS and name.startswith(("num_", "n_")):
                small[name] = LAYERS
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        small[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}[name]
    for name in ("initializer_range", "init_std"):
        if isinstance(default.get(name), float):
            small[name] = 0.2
    for name, value in default.items():
        if (
            isinstance(value, list)
            and len(value) > LAYERS
            and name in ("layer_types", "layers_block_type", "mlp_layer_types")
        ):
            kinds = list(dict.fromkeys(value))
            small[name] = (kinds * LAYERS)[:LAYERS]
    if "qk_rope_head_dim" in small and "head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]
    return kind(**small | FITTING.get(family, {}) | variant)


def build(family: str, folder: Path) -> str:
    """Save a random tiny model of the family; returns its class."""
    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"its config does not become small: {size:,} parameters")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return type(model).__name__


def make_windows() -> list[np.ndarray]:
    """Windows of many lengths; ids from 3 on, since some families give special ones a meaning."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCABULARY, size=length) for length in LENGTHS]


@torch.no_grad()
def alone(folder: Path) -> list[np.ndarray]:
    """The truth: the family's own forward of one window after the other, PyTorch's own cross-entropy."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [one_window(model, window, "cpu")[1:] for window in make_windows()]


@torch.no_grad()
def together(opened: Opened, training: bool) -> list[np.ndarray]:
    """Losses of the same windows as a stage computes them, several rows a batch."""
    windows, live = make_windows(), Live(opened)
    rows = opened.rows(list(LENGTHS), WINDOW)
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(rows), ROWS_A_BATCH):
        chosen = rows[start : start + ROWS_A_BATCH]
        members = [index for row in chosen for index in row]
        batch = collate([windows[i] for i in members], renumbered(chosen), WINDOW)
        losses = live(batch, lambda nats: ~nats.isnan()).losses if training else batch_losses(opened, batch).loss
        found |= {index: values[1:] for index, values in zip(members, batch.gather(losses), strict=True)}
    return [found[index] for index in range(len(windows))]


def judge(family: str, folder: Path) -> Verdict:
    """Build, open and compare one family."""
    try:
        with time_limit(SECONDS):
            name = build(family, folder)
            truth = alone(folder)
            if not all(np.isfinite(losses).all() for losses in truth):
                raise ValueError("its own plain forward gives losses that are not finite")
    except Exception as error:  # foreign code of two hundred families
        return Verdict(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.split()[0]], "not built", why=brief(error))
    try:
        with time_limit(SECONDS):
            opened = open_model(folder, "score.model", WINDOW)
    except UserError as error:
        return Verdict(family, name, "refused", why=brief(error).split(f"({name}) ")[-1].split(";")[0])
    worst = max(
        float(np.abs(one - other).max(initial=0.0))
        for training in (False, True)
        for one, other in zip(together(opened, training), truth, strict=True)
    )
    way = opened.isolation if worst <= TOLERANCE_NATS else "wrong"
    return Verdict(family, name, way, opened.linear, worst)


@contextmanager
def time_limit(seconds: int) -> Generator[None]:
    """Raise TimeoutError if the block takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def brief(error: BaseException) -> str:
    """The last words of a library's message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 160 else f"{text[:157]}..."


def walk(families: Sequence[str]) -> Generator[Verdict]:
    """A verdict for each."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    scratch = Path(tempfile.mkdtemp())
    try:
        for family in families:
            shutil.rmtree(scratch / "model", ignore_errors=True)
            yield judge(family, scratch / "model")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def page(verdicts: list[Verdict]) -> str:
    """The table as Markdown."""
    counts = Counter(verdict.way for verdict in verdicts)
    built = len(verdicts) - counts["not built"]
    lines = [
        "# Families",
        "",
        "Windows share rows only where it is proven on the model itself, when it is opened, that they do not see each other"
        " (`schemas/probe.py`). This page is what that came to for every causal family of transformers"
        f" {transformers.__version__}, each tiny and random, made by",
        "`python -m benchmarks.families --write docs/families.md`. *varlen*: windows share rows, attention is"
        " told where each begins. *packed*: they share rows and restart positions. *alone*: a window a row, of"
        " unequal lengths. *refused*: the model cannot be used, with the reason. The last column is the largest difference"
        " of any loss from the same window alone, over scoring and training.",
        "",
        "On SmolLM2-135M at windows of 1,024 the probe takes 2.2 s of one idle CPU core, in float32 and in bfloat16 (median of"
        " five).",
        "",
        f"{built} families and variants could be built: {counts['varlen']} varlen, {counts['packed']} packed, {counts['alone']} alone, {counts['refused']} refused,"
        f" **{counts['wrong']} silently wrong**. {counts['not built']} could not be built tiny and are listed last.",
        "",
        "| family | class | way | linear head | nats | why |",
        "|---|---|---|---|---|---|",
    ]
    order = {way: number for number, way in enumerate(("wrong", "varlen", "packed", "alone", "refused", "not built"))}
    for item in sorted(verdicts, key=lambda item: (order[item.way], item.family)):
        linear = "" if item.linear is None else "yes" if item.linear else "no"
        nats = f"{item.nats:.0e}" if item.linear is not None else ""
        why = item.why.replace("|", "/").replace("\n", " ")
        lines.append(f"| {item.family} | {item.model} | {item.way} | {linear} | {nats} | {why} |")
    return "\n".join(lines) + "\n"


def main(
    families: Annotated[list[str] | None, typer.Argument(help="Model types; default: all.")] = None,
    write: Annotated[Path | None, typer.Option(help="Markdown file for the table.")] = None,
) -> None:
    """Walk and print."""
    console, verdicts = Console(soft_wrap=True, highlight=False), []
    for verdict in walk(families or WALK):
        verdicts.append(verdict)
        console.print(f"{verdict.family:32} {verdict.way:10} {verdict.nats:.1e} {verdict.why}", markup=False)
    console.print(str(Counter(verdict.way for verdict in verdicts)))
    if write:
        write.write_text(page(verdicts))


if __name__ == "__main__":
    typer.run(main)
