"""The forward: which windows share rows and batches, and what a model is told of them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from schemas import attention
from schemas.batch import collate
from schemas.forward import Isolation, Opened, decoder_layers, forward

LENGTHS = [3, 8, 2, 5, 7, 1, 4]


class Recorder(nn.Module):
    """A body that keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.told: dict[str, Any] = {}

    @property
    def base_model(self) -> "Recorder":
        return self

    def forward(self, **told: Any) -> Any:
        self.told = told | {"bounded": attention._bounded.get()}
        return SimpleNamespace(last_hidden_state=told["input_ids"])


def opened(isolation: Isolation, module: Any = None) -> Opened:
    return Opened(module, linear=True, isolation=isolation, compute=torch.float32)


def windows() -> list[np.ndarray]:
    return [np.arange(length) + 10 * number + 1 for number, length in enumerate(LENGTHS)]


def test_windows_share_rows_as_their_isolation_allows_and_rows_of_one_come_before_those_that_need_a_mask() -> None:
    alone, packed, varlen = (opened(kind).batches(LENGTHS, 8, 16) for kind in ("alone", "packed", "varlen"))
    for found in (alone, packed, varlen):
        assert sorted(index for batch in found for row in batch for index in row) == list(range(len(LENGTHS)))
    assert all(len(row) == 1 for batch in alone for row in batch)
    filled = [[sum(LENGTHS[index] for index in row) for batch in found for row in batch] for found in (packed, varlen)]
    assert max(filled[0]) <= 8 < max(filled[1]) <= 16
    shared = [len(row) > 1 for batch in packed for row in batch]
    assert shared == sorted(shared) and {*shared} == {True, False}
    assert opened("varlen").batches([8], 8, 4) == [[[0]]]
    assert opened("packed").batches([7, 1, 6], 8, 16) == [[[2], [0, 1]]]


@pytest.mark.parametrize("isolation", ["alone", "packed", "varlen"])
def test_a_batchs_windows_are_those_whose_numbers_come_with_it(isolation: Isolation) -> None:
    given, seen = windows(), list[int]()
    for members, batch in opened(isolation).collated(given, 8, 16):
        for member, place in zip(members, batch.places, strict=True):
            assert batch.ids[place.row, place.start : place.start + place.length].tolist() == given[member].tolist()
        assert batch.ids.numel() <= 16
        seen += members
    assert sorted(seen) == list(range(len(given)))


@pytest.mark.parametrize("isolation", ["alone", "packed", "varlen"])
def test_a_model_is_told_of_windows_in_transformers_own_words_and_only_where_it_goes_by_them(
    isolation: Isolation,
) -> None:
    body, batch = Recorder(), collate(windows()[:3], [[1], [0, 2]])
    forward(opened(isolation, body), batch)
    told = body.told
    assert told.pop("input_ids") is batch.ids and told.pop("use_cache") is False
    assert told.pop("bounded") is (isolation == "varlen")
    if isolation != "alone":
        assert told.pop("position_ids") is batch.positions
    if isolation == "varlen":
        mask = told.pop("attention_mask")
        assert mask.dtype == torch.bool and mask.shape == batch.ids.shape and mask.all()
        assert told.keys() == FlashAttentionKwargs.__annotations__.keys()
        assert told["cu_seq_lens_q"] is told["cu_seq_lens_k"] is batch.bounds
        assert told["max_length_q"] == told["max_length_k"] == batch.longest
    else:
        assert not told


def test_decoder_layers_are_the_longest_list_of_a_body_and_none_of_one_without() -> None:
    body = Recorder()
    assert len(decoder_layers(body)) == 0
    body.few, body.many, body.fewer = (nn.ModuleList(nn.Identity() for _ in range(count)) for count in (2, 3, 1))
    assert decoder_layers(body) is body.many
