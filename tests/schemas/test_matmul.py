"""What a step asks of a machine, against PyTorch's own counter of FLOPs."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.batch import IGNORE, collate
from schemas.forward import Opened
from schemas.matmul import Weights
from trainer.live import Live

SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kept", [0, 10, 31])
@pytest.mark.parametrize("backward", ["full", "kept"])
def test_the_flops_of_a_step_are_those_of_its_products_without_attention(tied, kept, backward):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    live = Live(Opened(model, linear=True, isolation="alone", compute=torch.float32), backward)
    batch = collate([torch.arange(32).numpy()], [[0]])
    order = torch.arange(32)[None]
    onednn = {torch.ops.mkldnn._linear_pointwise: lambda rows, weight, *_, **__: 2 * math.prod(rows) * weight[0]}
    with FlopCounterMode(display=False, custom_mapping=onednn) as counter:
        live(batch, lambda _losses: (order < kept) & (batch.targets != IGNORE)).loss_sum.backward()
    products = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    assert Weights.of(model).step_flops(32, kept, kept if backward == "kept" else 32) == products
