"""Compiled code reads and writes no memory but its own, whatever the shapes of a model and of what it is called with."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

import offramp
from helpers import exits_for
from models import BLOCKS, PECULIAR, SMALL, byte_tokenizer, compiled_only, tiny
from offramp import Engine
from offramp.errors import UnsupportedModel
from offramp.exits.ngrams import Ngrams
from offramp.model.backbone import Backbone
from offramp.model.compiled.library import CompiledPart, Fine, Model
from offramp.model.compiled.weights import Weight
from offramp.model.families import FAMILIES, family_of
from offramp.model.loading import adopt, check


def random_model(family, **changed):
    """The library's model of a tiny config with these changes."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **PECULIAR[family], **changed})
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=FAMILIES[family].implementation
    )


def mlp_of(width):
    return random_model("llama", intermediate_size=width, num_hidden_layers=1).model.layers[0].mlp


def with_a_wider_mlp(model):
    model.model.layers[3].mlp = mlp_of(160)


def with_more_keys_in_a_block(model):
    wider = random_model("llama", num_key_value_heads=4, num_hidden_layers=4).model.layers[3].self_attn
    model.model.layers[3].self_attn = wider


@compiled_only
@pytest.mark.parametrize("change", [with_a_wider_mlp, with_more_keys_in_a_block])
def test_blocks_of_different_sizes_are_compiled(change):
    model = random_model("llama")
    change(model)
    backbone = adopt(model)
    assert backbone.engine == "compiled blocks"
    assert max(check(backbone)) <= 1e-5


@compiled_only
def test_an_embedding_that_is_smaller_than_the_head_is_not_compiled():
    model = random_model("llama")
    model.model.embed_tokens = nn.Embedding(64, 32)
    backbone = Backbone(model, tiny("llama").tokenizer, tiny("llama").source)
    with pytest.raises(UnsupportedModel, match="no compiled blocks in float32: the embedding has fewer tokens"):
        backbone.use_compiled_blocks("float32")


@compiled_only
@pytest.mark.parametrize(
    ("family", "changed", "engine"),
    [
        ("mamba2", {"conv_kernel": 1}, "library blocks"),
        ("mamba2", {"state_size": 4}, "library blocks"),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}, "library blocks"),
        ("bamba", {"attn_layer_indices": []}, "compiled blocks"),
        ("mamba2", {"n_groups": 1}, "compiled blocks"),
    ],
)
def test_models_at_the_edge_of_what_is_compiled_are_right(family, changed, engine):
    backbone = adopt(random_model(family, **changed))
    assert backbone.engine == engine
    answers = [Engine(backbone).generate([1, 2, 3], max_tokens=20, end_ids=frozenset()).ids]
    backbone.use_library_blocks()
    answers.append(Engine(backbone).generate([1, 2, 3], max_tokens=20, end_ids=frozenset()).ids)
    assert answers[0] == answers[1]


@compiled_only
def test_a_model_that_does_not_fit_is_loaded_on_the_librarys_blocks_or_refused(tmp_path, own_cache):
    model = random_model("mamba2", state_size=4)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = [offramp.load(str(tmp_path), dtype).backbone for dtype in ("float32", "bfloat16")]
    assert [(each.engine, each.weight_format) for each in loaded] == [
        ("library blocks", "float32"),
        ("library blocks", "bfloat16"),
    ]
    assert Engine(loaded[0]).generate([1, 2], max_tokens=9).ids == Engine(adopt(model)).generate([1, 2], max_tokens=9).ids
    assert all(folder.name.endswith("-library") for folder in own_cache.glob("formats/*/"))
    with pytest.raises(UnsupportedModel, match="no compiled blocks in int8: a mixer of 8 heads and 4 states") as refused:
        offramp.load(str(tmp_path), "int8")
    assert refused.value.hint == "Use bfloat16 or float32."


@pytest.mark.parametrize("blocks", [0, -1, 10**6, None, "6"])
def test_an_absurd_number_of_blocks_is_refused_before_any_is_made(blocks):
    config = SimpleNamespace(model_type="llama", num_hidden_layers=blocks)
    with pytest.raises(UnsupportedModel, match=f"cannot have {blocks} blocks"):
        family_of(config, tiny("llama").source)


@compiled_only
def test_a_sketch_finds_the_likeliest_of_more_than_a_million_tokens():
    tokens, dims, candidates = 3 << 19, 8, 500
    torch.manual_seed(0)
    head, norm, eye = Weight({"w": torch.randn(tokens, dims)}), torch.ones(dims), Weight({"w": torch.eye(dims)})
    sketch = CompiledPart("sketch", reduce=eye, expand=head, candidates=candidates)
    model = Model(CompiledPart("ends", head=Fine(head), norm=norm, embedding=head, eps=1e-6), [])
    h, found, whole = torch.randn(2, dims), torch.empty(2, tokens), torch.empty(2, tokens)
    for pointer, y in ((sketch.pointer, found), (None, whole)):
        model.call("offramp_logits", pointer, h.data_ptr(), 2, y.data_ptr())
    assert torch.equal(found.topk(candidates).indices, whole.topk(candidates).indices)
    assert (found > float("-inf")).sum() == 2 * candidates


@compiled_only
@torch.inference_mode()
def test_rows_and_blocks_that_are_not_there_are_refused():
    backbone = tiny("llama/compiled")
    h, step = backbone.embed(torch.tensor([[1, 2, 3]]))
    for call in (
        lambda: backbone.logits(h[..., :16]),
        lambda: backbone.run(h[..., :16], 0, 2, backbone.state(), step),
        lambda: backbone.run(h, -2, -1, backbone.state(), step),
        lambda: backbone.runtime.product_of(nn.Linear(32, 8))(torch.zeros(2, 8)),
        lambda: backbone.sketched(torch.eye(32), torch.eye(32), 300)(h),
        lambda: backbone.sketched(torch.zeros(8, 32), torch.zeros(32, 16), 3)(h),
    ):
        with pytest.raises(ValueError, match=r"numbers|blocks|candidates|sketch"):
            call()


@compiled_only
@pytest.mark.parametrize("family", ["llama", "mamba2"])
@torch.inference_mode()
def test_a_memory_of_another_model_or_batch_is_refused(family):
    backbone, other = tiny(f"{family}/compiled"), tiny(f"{family}/compiled", seed=1)
    h, step = backbone.embed(torch.tensor([[1, 2, 3]]))
    begun = backbone.state()
    backbone.run(h, 0, BLOCKS, begun, step)
    for state, twice in ((other.state(), 1), (tiny(family).state(), 1), (begun, 2)):
        both = h.repeat(twice, 1, 1)
        with pytest.raises(ValueError, match=r"another model|library's blocks|holds 1 texts"):
            backbone.run(both, 0, BLOCKS, state, backbone.step(both, 3))


@compiled_only
def test_a_table_of_drafts_beyond_the_vocabulary_is_refused():
    backbone, exits = tiny("llama/compiled"), exits_for("llama", readout="deep")
    exits.ngrams = Ngrams(torch.tensor([1, 0], dtype=torch.int32), torch.tensor([300 << 8, 0], dtype=torch.int32))
    with pytest.raises(ValueError, match="beyond the vocabulary"):
        Engine(backbone, exits, fill="verify")
    exits.ngrams = Ngrams(exits.ngrams.keys, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="int32 numbers"):
        Engine(backbone, exits, fill="verify")
