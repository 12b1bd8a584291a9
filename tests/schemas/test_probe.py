"""Law 13: the probe notices a model that sees later tokens or other windows, and says how windows are kept apart."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from schemas.batch import collate
from schemas.errors import UserError
from schemas.loss import batch_losses
from schemas.probe import probe_length, prove

VOCABULARY, WIDTH = 50, 16


class Toy(nn.Module):
    """A model whose every token sees exactly what `sees` says: ids and positions to a [rows, columns, columns] mask."""

    def __init__(self, sees: Any, takes_positions: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.sees, self.takes_positions = sees, takes_positions
        self.config = SimpleNamespace(to_dict=lambda: {})
        self.base_model = self.body
        self.device = torch.device("cpu")

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def body(self, input_ids: torch.Tensor, use_cache: bool, position_ids: torch.Tensor | None = None) -> Any:
        if position_ids is not None and not self.takes_positions:
            raise TypeError("unexpected position_ids")
        columns = torch.arange(input_ids.shape[1])
        positions = columns.expand_as(input_ids) if position_ids is None else position_ids
        mask = self.sees(columns, positions).to(self.embedding.weight.dtype)
        hidden = torch.tanh(mask @ self.embedding(input_ids) / mask.sum(-1, keepdim=True).clamp_min(1) * 3)
        return SimpleNamespace(last_hidden_state=hidden)

    def forward(self, input_ids: torch.Tensor, use_cache: bool, position_ids: torch.Tensor | None = None) -> Any:
        hidden = self.body(input_ids, use_cache, position_ids).last_hidden_state
        return SimpleNamespace(logits=self.head(hidden))


def causal(columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return (columns[:, None] >= columns[None, :]).expand(*positions.shape, len(columns))


def by_window(columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    start = (positions == 0).cumsum(1)
    return causal(columns, positions) & (start[:, :, None] == start[:, None, :])


def everything(columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return torch.ones(*positions.shape, len(columns))


def in_blocks(columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Blocks of 16 that see the whole of themselves: no half of a power of two sees the other."""
    return causal(columns, positions) | (columns[:, None] // 16 == columns[None, :] // 16)


def one_ahead(columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Each token sees what it predicts, and no more: losses of unchanged tokens cannot tell."""
    return (columns[:, None] + 1 >= columns[None, :]).expand(*positions.shape, len(columns))


def by_longest(columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Windows are kept apart, but one of more than 5 tokens changes the weights of all its batch, as longrope does."""
    return by_window(columns, positions) * (1.0 + (columns % 2) * (positions.max() >= 5))


def other_rows(columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Causal, but a row shorter than its batch is told apart from one alone: what leaks is the batch's width."""
    return causal(columns, positions) * (1.0 + len(columns) * (columns % 2))


def open_toy(sees: Any, dtype: torch.dtype = torch.float32, window: int = 32, **options: Any) -> Any:
    return prove(Toy(sees, **options).to(dtype).eval(), dtype, window, "base: toy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restarting_positions_that_a_model_reads_as_windows_are_packed(dtype: torch.dtype) -> None:
    opened = open_toy(by_window, dtype)
    assert opened.isolation == "packed" and opened.linear and opened.compute == dtype
    assert next(opened.module.parameters()).dtype == dtype  # widened for the probe alone


@pytest.mark.parametrize("options", [{}, {"takes_positions": False}], ids=["ignores positions", "knows none"])
def test_a_model_that_reads_no_windows_off_positions_gets_a_row_a_window(options: dict[str, Any]) -> None:
    opened = open_toy(causal, **options)
    assert opened.isolation == "alone"
    windows = [torch.arange(length).numpy() % VOCABULARY for length in (9, 4)]
    apart = [batch_losses(opened, collate([window], [[0]])).loss[0, : len(window) - 1] for window in windows]
    together = batch_losses(opened, collate(windows, [[0], [1]])).loss
    torch.testing.assert_close(together[1, :3], apart[1])


@pytest.mark.parametrize("sees", [everything, in_blocks, one_ahead])
def test_a_model_that_sees_later_tokens_is_refused(sees: Any) -> None:
    with pytest.raises(UserError, match=r"base: toy \(Toy\) is not causal"):
        open_toy(sees, window=64)


@pytest.mark.parametrize("sees", [other_rows, by_longest])
def test_a_model_whose_losses_depend_on_the_batch_is_refused(sees: Any) -> None:
    with pytest.raises(UserError, match="what else is in the batch"):
        open_toy(sees, window=64)


@pytest.mark.parametrize("window", range(2, 10))
def test_windows_share_a_row_in_the_probe_however_short_they_are(window: int) -> None:
    assert open_toy(by_window, window=window).isolation == "packed"
    assert open_toy(causal, window=window).isolation == "alone"


def test_a_model_of_nan_weights_is_refused() -> None:
    toy = Toy(by_window)
    nn.init.constant_(toy.head.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        prove(toy, torch.float32, 32, "base: toy")


@pytest.mark.parametrize(
    ("limits", "longest"),
    [({}, 64), ({"sliding_window": 200}, 1000), ({"inner": {"attention_chunk_size": 64}}, 1000), ({"sliding_window": 1000}, 64),
     ({"rope": {"original_max_position_embeddings": 500}}, 1000), ({"use_sliding_window": True}, 64),
     ({"max_window_layers": 28, "sliding_window_pattern": 6}, 64), ({"rates": {"compressed_attention": 128}}, 1000),
     ({"windows": [2000, [100]]}, 1000), ({"local_attention": 128}, 1000), ({"index_topk": 512}, 1000)],
)  # fmt: skip
def test_the_probe_is_as_long_as_a_window_where_the_config_names_a_length_that_windows_exceed(
    limits: dict[str, Any], longest: int
) -> None:
    assert probe_length(SimpleNamespace(to_dict=lambda: limits), 1000) == longest


def test_a_short_window_is_probed_whole() -> None:
    assert probe_length(LlamaConfig(), 40) == 40
