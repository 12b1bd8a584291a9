"""Law 13: the probe notices a model that sees later tokens or other windows, and says how windows are kept apart."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from schemas import attention
from schemas.batch import collate
from schemas.errors import UserError
from schemas.loss import batch_losses
from schemas.probe import has_linear_head, probe_length, prove

VOCABULARY, WIDTH = 50, 16


class Toy(nn.Module):
    """A model whose every token sees exactly what `sees` says: ids and positions to a [rows, columns, columns] mask."""

    def __init__(self, sees: Any, takes_positions: bool = True, finish: Any = lambda logits: logits):
        """`finish`: what becomes of the head's logits."""
        super().__init__()
        torch.manual_seed(0)
        self.finish = finish
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
        assert use_cache is False  # a cache of windows that share a row would be read by none and cost memory
        if position_ids is not None and not self.takes_positions:
            raise TypeError("unexpected position_ids")
        columns = torch.arange(input_ids.shape[1])
        positions = columns.expand_as(input_ids) if position_ids is None else position_ids
        mask = self.sees(columns, positions).to(self.embedding.weight.dtype)
        hidden = torch.tanh(mask @ self.embedding(input_ids) / mask.sum(-1, keepdim=True).clamp_min(1) * 3)
        return SimpleNamespace(last_hidden_state=hidden)

    def forward(self, input_ids: torch.Tensor, use_cache: bool, position_ids: torch.Tensor | None = None) -> Any:
        hidden = self.body(input_ids, use_cache, position_ids).last_hidden_state
        return SimpleNamespace(logits=self.finish(self.head(hidden)))


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


def last_but_one(columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The last token but one sees the last."""
    width = len(columns)
    return causal(columns, positions) | ((columns[:, None] == width - 2) & (columns[None, :] == width - 1))


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


@pytest.mark.parametrize("sees", [everything, in_blocks, one_ahead, last_but_one])
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
    with pytest.raises(
        UserError, match="gives losses that are not finite: its weights are damaged; choose another model"
    ):
        prove(toy, torch.float32, 32, "base: toy")


@pytest.mark.parametrize(
    ("limits", "longest"),
    [({}, 64), ({"sliding_window": 200}, 1000), ({"inner": {"attention_chunk_size": 64}}, 1000), ({"sliding_window": 1000}, 64),
     ({"rope": {"original_max_position_embeddings": 500}}, 1000), ({"use_sliding_window": True}, 64),
     ({"max_window_layers": 28, "sliding_window_pattern": 6}, 64), ({"rates": {"compressed_attention": 128}}, 1000),
     ({"windows": [2000, [100]]}, 1000), ({"sliding_window": 2}, 1000), ({"sliding_window": 1}, 64),
     ({"window_kind": "local", "chunk": None, "block_ratio": 2.5}, 64), ({"local_attention": 128}, 1000), ({"index_topk": 512}, 1000)],
)  # fmt: skip
def test_the_probe_is_as_long_as_a_window_where_the_config_names_a_length_that_windows_exceed(
    limits: dict[str, Any], longest: int
) -> None:
    assert probe_length(SimpleNamespace(to_dict=lambda: limits), 1000) == longest


@pytest.mark.parametrize(
    ("window", "lengths"),
    [(40, [40, 2, 5, 10, 20]), (1000, [64, 2, 4, 8, 16, 32]), (9, [9, 2, 4]), (5, [5, 2, 2]), (2, [2, 2, 2])],
)
def test_probe_windows_halve_from_the_longest_down_to_two_and_hold_tokens_beyond_the_special_ones(
    window: int, lengths: list[int]
) -> None:
    toy, seen = Toy(by_window), list[torch.Tensor]()
    forward = toy.forward

    def watched(input_ids: torch.Tensor, use_cache: bool, position_ids: torch.Tensor | None = None) -> Any:
        seen.append(input_ids[0])
        return forward(input_ids, use_cache, position_ids)

    toy.forward = watched
    prove(toy, torch.float32, window, "base")
    windows = seen[1 : 1 + len(lengths)]  # the first call looks at the head
    assert [len(ids) for ids in windows] == lengths
    assert all(int(ids.min()) >= 8 and int(ids.max()) < VOCABULARY for ids in windows)
    assert len(set(torch.cat(windows).tolist())) > min(12, sum(lengths) // 2)


def test_one_window_fills_a_row_the_others_share_one_and_all_neighbours_of_the_last_change_for_isolation() -> None:
    toy, seen = Toy(by_window), list[torch.Tensor]()
    body = toy.body

    def watched(input_ids: torch.Tensor, use_cache: bool, position_ids: torch.Tensor | None = None) -> Any:
        seen.append(input_ids)
        return body(input_ids, use_cache, position_ids)

    toy.base_model = watched
    prove(toy, torch.float32, 40, "base")
    shared, one, other = (ids for ids in seen if len(ids) > 1)
    assert shared.shape == (2, 40) and torch.equal(shared, one)  # 40 tokens; 2, 5, 10 and 20 beside each other
    assert (one != other).flatten().tolist() == [True] * 40 + [True] * 17 + [False] * 23


def test_losses_that_are_finite_alone_and_not_in_shared_rows_keep_windows_alone() -> None:
    def broken(columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        restarted = (positions == 0).sum(1) > 1
        return torch.where(restarted[:, None, None], torch.nan, causal(columns, positions).float())

    assert open_toy(broken).isolation == "alone"


def test_a_short_window_is_probed_whole() -> None:
    assert probe_length(LlamaConfig(), 40) == 40


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(shape).to(dtype).eval()


def ignore_bounds(query: Any, key: Any, value: Any, bounds: torch.Tensor, scale: Any, sliding_window: Any) -> Any:
    whole = torch.tensor([0, int(bounds[-1])])
    return attention._window_by_window(query, key, value, whole, 0.0, scale, sliding_window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_boundaries_are_tried_before_positions(dtype: torch.dtype) -> None:
    model = llama(dtype)
    assert prove(model, dtype, 32, "base").isolation == "varlen"
    assert model.config._attn_implementation == attention.NAME and model.dtype == dtype


def test_attention_that_does_not_keep_to_its_boundaries_is_taken_off_again_and_positions_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_opaque", ignore_bounds)
    model = llama()
    assert prove(model, torch.float32, 32, "base").isolation == "packed"
    assert model.config._attn_implementation == "sdpa"


def in_narrow_dtype(wrong: Any) -> Any:
    """Attention that is right in float32 and `wrong` in any other dtype, as a kernel of its own may be."""
    right = attention._opaque
    return lambda query, *others: (right if query.dtype == torch.float32 else wrong)(query, *others)


def sees_all_of_its_window(query: Any, key: Any, value: Any, bounds: torch.Tensor, *_: Any) -> torch.Tensor:
    own = [slice(start, end) for start, end in pairwise(bounds.tolist())]
    pieces = [[tensor[window].transpose(0, 1) for tensor in (query, key, value)] for window in own]
    return torch.cat([scaled_dot_product_attention(*piece).transpose(0, 1) for piece in pieces])


def of_another_scale(query: Any, key: Any, value: Any, bounds: Any, scale: Any, sliding_window: Any) -> Any:
    return attention._window_by_window(query, key, value, bounds, 0.0, 2 * scale, sliding_window)


@pytest.mark.parametrize("wrong", [ignore_bounds, sees_all_of_its_window, of_another_scale])
def test_law_13_attention_is_proven_in_the_dtype_that_runs_where_float32_takes_another_path(
    wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prove(llama(torch.bfloat16), torch.bfloat16, 32, "base").isolation == "varlen"
    monkeypatch.setattr(attention, "_opaque", in_narrow_dtype(wrong))
    assert prove(llama(), torch.float32, 32, "base").isolation == "varlen"
    assert prove(llama(torch.bfloat16), torch.bfloat16, 32, "base").isolation == "packed"


def test_a_refusal_says_how_far_off_each_way_was() -> None:
    with pytest.raises(UserError, match=r"\(\S+ nats packed, \S+ nats alone\); choose another model or context.window"):
        open_toy(other_rows)


@pytest.mark.parametrize(("isolation", "noise"), [("packed", 0.01), ("alone", 0.0)], ids=["its own noise", "a leak"])
def test_in_the_dtype_that_runs_a_leak_counts_and_the_noise_of_equal_runs_does_not(
    isolation: str, noise: float
) -> None:
    exact = [True]

    def sees(columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return by_window(columns, positions) if exact[0] or noise else causal(columns, positions)

    def finish(logits: torch.Tensor) -> torch.Tensor:  # what a body's dtype decides is seen at its logits
        return logits if exact[0] else logits + noise * torch.randn(logits.shape).to(logits.dtype)

    toy = Toy(sees, finish=finish).to(torch.bfloat16).eval()
    body = toy.body

    def watched(input_ids: torch.Tensor, use_cache: bool, position_ids: torch.Tensor | None = None) -> Any:
        exact[0] = toy.embedding.weight.dtype == torch.float32
        return body(input_ids, use_cache, position_ids)

    toy.body = toy.base_model = watched
    assert prove(toy, torch.bfloat16, 32, "base").isolation == isolation


def test_weights_and_buffers_are_after_the_probe_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(by_window).to(torch.bfloat16)
    toy.register_buffer("scale", torch.rand(5).to(torch.bfloat16))
    toy.register_buffer("count", torch.arange(3))
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}

    def unchanged() -> bool:
        now = toy.state_dict()
        return all(now[name].dtype == old.dtype and torch.equal(now[name], old) for name, old in before.items())

    assert prove(toy, torch.bfloat16, 32, "base").isolation == "packed" and unchanged()
    widen = torch.Tensor.float

    def no_room(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == toy.scale.shape:
            raise torch.OutOfMemoryError
        return widen(tensor)

    monkeypatch.setattr(torch.Tensor, "float", no_room)
    assert prove(toy, torch.bfloat16, 32, "base").isolation == "packed" and unchanged()


def test_a_model_that_reads_more_tokens_than_it_predicts_or_fewer_is_probed_with_what_it_knows_both_ways() -> None:
    for name, layer in {"embedding": nn.Embedding(9, WIDTH), "head": nn.Linear(WIDTH, 9, bias=False)}.items():
        toy = Toy(by_window)
        setattr(toy, name, layer)
        assert prove(toy, torch.float32, 32, "base").isolation == "packed"


def test_a_model_that_cannot_be_run_is_refused_with_its_own_words() -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("no kernel for this")

    with pytest.raises(UserError, match=r"base: toy \(Toy\) cannot be run: no kernel for this; choose another model"):
        open_toy(fail)


@pytest.mark.parametrize(
    "finish",
    [
        lambda logits: 30 * torch.tanh(logits / 30),
        lambda logits: logits * 0.5,
        lambda logits: logits + 0.1,
        lambda logits: logits[..., :-1],
        torch.relu,
    ],
    ids=["soft cap", "scale", "shift", "cut", "none below zero"],
)
def test_a_head_is_linear_only_if_nothing_becomes_of_its_logits(finish: Any) -> None:
    assert has_linear_head(Toy(by_window))
    assert not has_linear_head(Toy(by_window, finish=finish))


def hidden_by(toy: Toy, change: Any) -> Toy:
    """A toy whose body, asked for alone, gives other hidden states than its head reads."""
    body = toy.body

    def other(input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(last_hidden_state=change(body(input_ids, use_cache).last_hidden_state))

    toy.base_model = other
    return toy


@pytest.mark.parametrize(
    "change",
    [lambda hidden: 1.2 * hidden, lambda hidden: hidden[:, :-1], lambda hidden: torch.cat([hidden, hidden])],
    ids=["scaled", "short", "twice"],
)
def test_a_head_that_does_not_read_the_last_hidden_state_is_not_linear(change: Any) -> None:
    assert not has_linear_head(hidden_by(Toy(by_window), change))


def test_a_head_is_not_linear_that_is_not_there_is_not_called_or_has_a_bias_be_it_zero() -> None:
    toys = [Toy(by_window) for _ in range(4)]
    missing, biased, uncalled, bare = toys
    missing.get_output_embeddings = lambda: None
    biased.head = nn.Linear(WIDTH, VOCABULARY)
    nn.init.zeros_(biased.head.bias)
    uncalled.forward = lambda input_ids, use_cache, position_ids=None: SimpleNamespace(
        logits=uncalled.body(input_ids, use_cache, position_ids).last_hidden_state @ uncalled.head.weight.T
    )
    bare.base_model = lambda input_ids, use_cache: SimpleNamespace()
    assert not any(has_linear_head(toy) for toy in toys)
    assert not any(toy.head._forward_hooks for toy in toys)
    opened = prove(missing, torch.float32, 32, "base")
    assert opened.isolation == "packed" and not opened.linear


def test_a_head_that_is_but_a_weight_is_linear() -> None:
    class Head(nn.Module):
        def __init__(self, weight: torch.Tensor):
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ self.weight.T

    toy = Toy(by_window)
    toy.head = Head(torch.randn(VOCABULARY, WIDTH))
    assert has_linear_head(toy)
    toy.get_output_embeddings = nn.Identity  # one that computes without a weight of its own
    assert not has_linear_head(toy)
