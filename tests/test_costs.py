"""The analytic FLOPs and bytes equal what torch's own counter counts on tiny models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import models
from offramp.exits.gates import GATES
from offramp.exits.parts import MambaBlock
from offramp.exits.readouts import READOUTS
from offramp.model import costs as model_costs
from offramp.model.costs import Costs, matrix_flops, projected, scan_flops
from offramp.model.families import FAMILIES
from offramp.model.loading import wrap

HIDDEN, VOCABULARY, CONTEXT = 32, 97, 9
LLAMA_LIKE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "num_hidden_layers": 3, "head_dim": 12},  # heads wider together than the hidden state
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mistral": {**LLAMA_LIKE, "sliding_window": 4},
    "mamba": {"hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    "mamba2": {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 2,
    },
}


def tiny(family):
    torch.manual_seed(0)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **tokens, **MODELS[family])
    attention = FAMILIES[family].implementation
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    return wrap(model, tokenizer=None, name="tiny")


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3"])
def backbone(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def sliding():
    return tiny("mistral")


def counted(function):
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def before_the_last(backbone):
    """The last of CONTEXT tokens, embedded, and a state that holds the tokens before it. Attention is plain products.

    The counter knows `bmm` but not SDPA on the CPU.
    """
    ids = torch.randint(0, VOCABULARY, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    state = backbone.state()
    with torch.inference_mode():
        h, step = backbone.embed(ids[:, :-1])
        backbone.run(h, 0, backbone.n_blocks, state, step)
        h, step = backbone.embed(ids[:, -1:], CONTEXT - 1)
    backbone.model.set_attn_implementation("eager")
    return h, state, step


def test_a_block_costs_what_the_counter_counts(backbone):
    h, state, step = before_the_last(backbone)
    costs = Costs(backbone)
    for index in range(backbone.n_blocks):
        assert counted(lambda i=index: backbone.run(h, i, i + 1, state, step)) == costs.block(index, CONTEXT)


def test_the_linear_part_of_a_block_is_its_weight_matrices(backbone):
    h, state, step = before_the_last(backbone)
    _, head_dim = backbone.kv_shape(0)
    attention = 4 * CONTEXT * backbone.config.num_attention_heads * head_dim
    total = counted(lambda: backbone.run(h, 0, 1, state, step))
    assert total - attention == matrix_flops(backbone.blocks[0])


def test_the_head_costs_what_the_counter_counts(backbone):
    assert counted(lambda: backbone.logits(torch.ones(1, 1, HIDDEN))) == Costs(backbone).head


def test_a_token_at_full_depth_costs_what_the_counter_counts(backbone):
    h, state, step = before_the_last(backbone)
    total = counted(lambda: backbone.logits(backbone.run(h, 0, backbone.n_blocks, state, step)))
    assert total == Costs(backbone).full(CONTEXT)


def test_the_project_fill_costs_what_the_counter_counts(backbone):
    h, state, step = before_the_last(backbone)
    costs = Costs(backbone)
    for index in range(backbone.n_blocks):
        assert counted(lambda i=index: backbone.project(h, i, i + 1, state, step)) == costs.project_keys[index]


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def mamba(request):
    return tiny(request.param)


@torch.inference_mode()
def test_a_mamba_blocks_products_cost_what_the_counter_counts(mamba):
    """The counter counts only matrix products. Of the scan that is C h: 2 of the 6 FLOPs for every entry of the state."""
    costs, state = Costs(mamba), mamba.state()
    h, step = mamba.embed(torch.tensor([[3]]))
    for index in range(mamba.n_blocks):
        mixer = mamba.mixer(index)
        read_out = 2 * mixer.intermediate_size * mixer.ssm_state_size
        total = counted(lambda i=index: mamba.run(h, i, i + 1, state, step))
        assert total - read_out == matrix_flops(mamba.blocks[index]) == costs.block(index, 5) - scan_flops(mixer)
        filled = counted(lambda i=index: mamba.project(h, i, i + 1, state, step))
        assert filled - read_out == projected(mixer) == costs.project_state[index] - scan_flops(mixer)


@torch.inference_mode()
def test_a_mamba_scan_counts_the_convolution_and_three_passes_over_the_state(mamba):
    state = mamba.state()
    h, step = mamba.embed(torch.tensor([[3]]))
    mamba.run(h, 0, 1, state, step)
    window, entries = state.ssm[0].window, state.ssm[0].h.numel()
    assert scan_flops(mamba.mixer(0)) == 2 * 4 * window.shape[-1] + 3 * 2 * entries


def test_of_experts_only_those_that_a_token_is_sent_to_are_counted():
    config = {**LLAMA_LIKE, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_offset": 0, "attn_layer_period": 2}
    config |= {"expert_layer_offset": 1, "expert_layer_period": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}
    costs = []
    for routed in (1, 2):
        settings = AutoConfig.for_model("jamba", **config, num_experts=4, num_experts_per_tok=routed)
        costs.append(Costs(wrap(AutoModelForCausalLM.from_config(settings, dtype=torch.float32), None, "tiny")))
    expert = 3 * HIDDEN * 48
    assert costs[1].block(1, 5) - costs[0].block(1, 5) == 2 * expert
    assert costs[1].block_bytes(1, 5) - costs[0].block_bytes(1, 5) == 4 * expert


def test_a_mamba_token_costs_the_same_whatever_came_before_it(mamba):
    costs = Costs(mamba)
    assert costs.full(5) == costs.full(5000)
    assert costs.block_bytes(0, 5) == costs.block_bytes(0, 5000)


@pytest.mark.parametrize(
    "make",
    [*GATES.values(), *READOUTS.values()],
    ids=[*(f"gate-{kind}" for kind in GATES), *(f"readout-{kind}" for kind in READOUTS)],
)
def test_the_linear_share_of_an_exit_part_is_what_the_counter_counts(make):
    part = make(HIDDEN, 64).eval()
    mixers = [module for module in part.modules() if isinstance(module, MambaBlock)]
    # Of a scan, the counter counts only C h, which is a matrix product.
    unseen = sum(mixer.scan_flops() - 2 * mixer.inner * mixer.states for mixer in mixers)
    read = torch.ones(1, 1, 2 * HIDDEN if make is READOUTS["deep"] else HIDDEN)
    assert counted(lambda: part(read)) == part.flops() - unseen


@pytest.mark.parametrize("make", [GATES["mamba"], READOUTS["mamba"]])
def test_the_scan_share_counts_the_convolution_and_three_passes_over_the_state(make):
    part = make(HIDDEN, 64).eval()
    _, (window, h) = part(torch.ones(1, 1, HIDDEN))
    mixer = next(module for module in part.modules() if isinstance(module, MambaBlock))
    assert mixer.scan_flops() == 2 * MambaBlock.CONV * window.shape[-1] + 3 * 2 * h[0].numel()


def test_only_attention_grows_with_the_context(backbone):
    costs = Costs(backbone)
    _, head_dim = backbone.kv_shape(0)
    grown = costs.block(0, 20) - costs.block(0, 19)
    assert grown == 4 * backbone.config.num_attention_heads * head_dim
    assert costs.full(20) - costs.full(19) == backbone.n_blocks * grown


def test_a_block_reads_its_parameters_and_the_keys_and_values_seen(backbone):
    h, state, step = before_the_last(backbone)
    with torch.inference_mode():
        backbone.run(h, 0, backbone.n_blocks, state, step)
    costs = Costs(backbone)
    for index, block in enumerate(backbone.blocks):
        kept = state.kv[index].keys.numel() + state.kv[index].values.numel()
        parameters = sum(parameter.numel() for parameter in block.parameters())
        assert costs.block_bytes(index, CONTEXT) == 4 * (parameters + kept)


def test_the_head_reads_its_weight(backbone):
    assert Costs(backbone).head_bytes == 4 * backbone.head.weight.numel()


@pytest.mark.parametrize("family", ["llama", "llama/compiled", "mamba2", "bamba", "falcon_h1"])
@torch.inference_mode()
def test_a_sequences_memory_is_what_its_blocks_keep(family: str) -> None:
    backbone, costs, tokens = models.tiny(family), Costs(models.tiny(family)), 11
    state = backbone.state(tokens)
    h, step = backbone.embed(torch.arange(tokens)[None])
    backbone.run(h, 0, backbone.n_blocks, state, step)
    kept = [part for kv in state.kv if kv is not None for part in (kv.keys, kv.values)]
    kept += [ssm.h for ssm in state.ssm if ssm is not None]
    assert costs.memory(tokens) == sum(part.numel() * part.itemsize for part in kept)


def test_as_many_sequences_stand_side_by_side_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs(models.tiny("llama"))
    assert costs.at_once(100, 64) == 64
    monkeypatch.setattr(model_costs, "ROOM", 5 * costs.memory(100) + 1)
    assert costs.at_once(100, 64) == 5
    assert costs.at_once(1000, 64) == 1


def test_the_costs_of_several_blocks_are_their_sum(sliding):
    costs = Costs(sliding)
    for context in (1, 60, 3, 60):
        assert costs.blocks(0, 2, context) == costs.block(0, context) + costs.block(1, context)


def test_a_block_with_a_sliding_window_costs_no_more_past_the_window(sliding):
    costs = Costs(sliding)
    assert costs.block(0, 3) < costs.block(0, 4) == costs.block(0, 5) == costs.block(0, 60)
    assert costs.block_bytes(0, 3) < costs.block_bytes(0, 4) == costs.block_bytes(0, 60)
