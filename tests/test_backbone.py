"""The adapter equals the library, for every family."""

from __future__ import annotations

import copy
import gc
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import offramp
from helpers import damaged
from models import BLOCKS, COMPILED, HIDDEN, VOCAB, byte_tokenizer, saved, tiny
from offramp.errors import BadInput, BadNumbers, CorruptFile, UnsupportedModel
from offramp.evaluation.bench import compare
from offramp.model.backbone import Backbone
from offramp.model.costs import Costs
from offramp.model.families import FAMILIES
from offramp.model.hub import Source
from offramp.model.loading import check, outline, wrap

LENGTH = 24  # longer than every tiny model's sliding window


def ids_of(seed: int, length: int = LENGTH, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.inference_mode()
def test_a_full_pass_gives_the_librarys_logits(family: str) -> None:
    backbone, ids = tiny(family), ids_of(1, batch=3)
    assert difference(backbone.forward(ids), backbone.model(ids).logits) <= 1e-5


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=5, unique=True).map(sorted), seed=st.integers(0, 99))
@torch.inference_mode()
def test_a_pass_in_pieces_gives_the_librarys_logits(family: str, cuts: list[int], seed: int) -> None:
    backbone, ids = tiny(family), ids_of(seed)
    state, ours = backbone.state(capacity=4), []
    for start, stop in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        h, step = backbone.embed(ids[:, start:stop], start)
        ours.append(backbone.logits(backbone.run(h, 0, BLOCKS, state, step)))
    assert difference(torch.cat(ours, 1), backbone.model(ids).logits) <= 1e-5


@settings(max_examples=8, deadline=None)
@given(layer=st.integers(1, BLOCKS - 1), prompt=st.integers(1, LENGTH - 1))
@torch.inference_mode()
def test_shallow_blocks_token_by_token_and_deep_blocks_in_one_chunk_equal_the_full_model(
    family: str, layer: int, prompt: int
) -> None:
    backbone, ids = tiny(family), ids_of(3)
    state = backbone.state()
    h, step = backbone.embed(ids[:, :prompt])
    backbone.run(h, 0, BLOCKS, state, step)
    shallow = []
    for position in range(prompt, LENGTH):
        h, step = backbone.embed(ids[:, position : position + 1], position)
        shallow.append(backbone.run(h, 0, layer, state, step))
    chunk = torch.cat(shallow, 1)
    deep = backbone.run(chunk, layer, BLOCKS, state, backbone.step(chunk, prompt))
    assert difference(backbone.logits(deep), backbone.model(ids).logits[:, prompt:]) <= 1e-5


@torch.inference_mode()
def test_project_stores_what_the_block_itself_would_store(family: str) -> None:
    backbone = tiny(family)
    h = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    step = backbone.step(h, 0)
    for index in range(BLOCKS):
        ran, projected = backbone.state(), backbone.state()
        backbone.run(h, index, index + 1, ran, step)
        backbone.project(h, index, index + 1, projected, step)
        for kept, names in ((lambda state: state.kv, ("keys", "values")), (lambda state: state.ssm, ("window", "h"))):
            ours, whole = kept(projected)[index], kept(ran)[index]
            assert (ours is None) == (whole is None)
            for name in names if whole else ():
                torch.testing.assert_close(getattr(ours, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_project_is_its_attention_part_and_its_mamba_part(family: str) -> None:
    backbone = tiny(family)
    h = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    step = backbone.step(h, 0)
    whole, parts = backbone.state(), backbone.state()
    backbone.project(h, 1, BLOCKS, whole, step)
    for index in range(1, BLOCKS):
        backbone.project_keys(h, index, parts, step)
        backbone.project_state(h, index, parts)
    for left, right in zip(whole.kv[1:], parts.kv[1:], strict=True):
        assert left is None or (torch.equal(left.keys, right.keys) and torch.equal(left.values, right.values))
    for left, right in zip(whole.ssm[1:], parts.ssm[1:], strict=True):
        assert left is None or (torch.equal(left.window, right.window) and torch.equal(left.h, right.h))


@torch.inference_mode()
def test_logits_over_some_rows_are_those_rows_of_all_logits(family: str) -> None:
    backbone = tiny(family)
    h, rows = torch.randn(3, HIDDEN), torch.tensor([5, 0, 77])
    torch.testing.assert_close(backbone.logits(h, rows), backbone.logits(h)[:, rows])


@torch.inference_mode()
def test_rows_of_a_batch_can_be_dropped_midway() -> None:
    backbone, ids = tiny("llama"), ids_of(5, batch=3)
    state = backbone.state()
    h, step = backbone.embed(ids[:, :10])
    backbone.run(h, 0, BLOCKS, state, step)
    keep = torch.tensor([2, 0])
    state.select(keep)
    h, step = backbone.embed(ids[keep, 10:], 10)
    logits = backbone.logits(backbone.run(h, 0, BLOCKS, state, step))
    assert difference(logits, backbone.model(ids[keep]).logits[:, 10:]) <= 1e-5


@pytest.mark.parametrize("family_with_mixers", ["mamba", "mamba2", "jamba", "bamba", "falcon_h1", "nemotron_h"])
def test_wrapping_leaves_the_librarys_model_as_it_was(family_with_mixers: str) -> None:
    model = copy.deepcopy(tiny(family_with_mixers).model)
    ids, options = ids_of(4, 9), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    modules, before = list(model.modules()), model.generate(ids, **options)
    backbone = wrap(model, byte_tokenizer())
    assert list(model.modules()) == modules
    assert not any("forward" in vars(module) for module in modules)
    backbone.forward(ids)
    assert torch.equal(model.generate(ids, **options), before)


@torch.inference_mode()
def test_the_blocks_compute_with_the_librarys_own_weights(family: str) -> None:
    family = family.partition("/")[0]
    backbone = Backbone(copy.deepcopy(tiny(family).model), None, Source("a copy", ""))
    for parameter in backbone.model.parameters():
        parameter.mul_(1.1)
    assert difference(backbone.forward(ids_of(6)), backbone.model(ids_of(6)).logits) <= 1e-5


@pytest.mark.parametrize("compiled_family", COMPILED)
def test_a_backbone_can_change_its_runtime_and_change_back(compiled_family: str) -> None:
    model = copy.deepcopy(tiny(compiled_family).model)
    backbone, ids = Backbone(model, None, Source("a copy", "")), ids_of(7)
    before = backbone.forward(ids)
    backbone.use_compiled_blocks("float32")
    assert backbone.engine == "compiled blocks"
    torch.testing.assert_close(backbone.forward(ids), before, rtol=1e-4, atol=1e-4)
    backbone.use_library_blocks()
    assert backbone.engine == "library blocks"
    assert torch.equal(backbone.forward(ids), before)


def test_a_models_backbone_is_found_as_long_as_it_is_in_use() -> None:
    model, unwrapped = (copy.deepcopy(tiny("llama").model) for _ in range(2))
    first = Backbone(model, None, Source("first", ""))
    assert Backbone.of(model) is first
    assert Backbone.of(unwrapped) is None
    second = Backbone(model, None, Source("second", ""))
    assert Backbone.of(model) is second
    del second
    gc.collect()
    assert Backbone.of(model) is None


def test_the_self_check_finds_the_tiny_models_right(family: str) -> None:
    assert max(check(tiny(family))) <= 1e-5


@pytest.mark.parametrize("family_with_scales", ["granite", "cohere", "gemma2"])
def test_the_self_check_refuses_a_model_whose_row_is_wrong(
    family_with_scales: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tiny(family_with_scales)
    wrong = replace(FAMILIES["llama"], implementation=FAMILIES[family_with_scales].implementation)
    monkeypatch.setitem(FAMILIES, family_with_scales, wrong)
    with pytest.raises(UnsupportedModel, match=r"differ from the library's by \d") as raised:
        wrap(right.model, right.tokenizer)
    assert raised.value.hint


def test_an_unknown_family_is_refused_with_the_list_of_known_ones() -> None:
    import transformers

    config = transformers.OPTConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    with pytest.raises(UnsupportedModel, match="'opt'") as raised:
        wrap(transformers.OPTForCausalLM(config), byte_tokenizer())
    assert "llama" in raised.value.hint


def test_the_self_check_names_nan_logits() -> None:
    with pytest.raises(BadNumbers, match="NaN"):
        check(damaged(tiny("llama")))


def test_a_local_folder_loads_in_both_dtypes_with_the_same_hash(tmp_path, own_cache) -> None:
    folder = saved(tiny("llama"), tmp_path / "model")
    full, half = offramp.load(str(folder), "float32").backbone, offramp.load(str(folder), "bfloat16").backbone
    assert (full.weight_format, half.weight_format) == ("float32", "bfloat16")
    assert full.source.fingerprint == half.source.fingerprint == tiny("llama").source.fingerprint
    torch.testing.assert_close(full.forward(ids_of(0)), tiny("llama").forward(ids_of(0)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_loaded_weights_are_not_initialised_once_more(family: str, tmp_path, own_cache) -> None:
    """transformers 5 divides a loaded out_proj by √blocks, where the config asks for that for new weights."""
    backbone = tiny(family)
    folder = saved(backbone, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rescale_prenorm_residual": True}))
    loaded = offramp.load(str(folder), "float32", keep=True).backbone
    torch.testing.assert_close(loaded.forward(ids_of(0)), backbone.forward(ids_of(0)), rtol=1e-5, atol=1e-5)


def test_a_model_that_fails_in_bfloat16_runs_in_float32_and_says_so(tmp_path, own_cache, monkeypatch) -> None:
    from offramp.model import loading

    def fails_in_bfloat16(backbone: Backbone, *rest) -> tuple[float, float]:
        if backbone.weight_format == "bfloat16":
            raise BadNumbers("NaN")
        return check(backbone, *rest)

    folder = saved(tiny("gpt2"), tmp_path / "model")
    monkeypatch.setattr(loading, "check", fails_in_bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = offramp.load(str(folder)).backbone
    assert loaded.weight_format == "float32"
    assert any("float32" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_cut_off_weights_are_named(tmp_path, own_cache, share: float) -> None:
    folder = saved(tiny("llama"), tmp_path / "model")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CorruptFile, match="cannot be read") as raised:
        offramp.load(str(folder), "float32")
    assert raised.value.hint


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(BadInput, match="int3"):
        offramp.load("smollm2", "int3")


def outlined(family: str, folder: Path, **kwargs) -> Backbone:
    tiny(family).config.save_pretrained(folder)
    return outline(str(folder), "float32", **kwargs)


def test_an_outline_has_the_models_shape_and_no_weights(family: str, tmp_path: Path) -> None:
    backbone, whole = outlined(family.partition("/")[0], tmp_path), tiny(family)
    assert backbone.kinds == whole.kinds
    assert all(parameter.is_meta for parameter in backbone.model.parameters())
    assert Costs(backbone).full(9) == Costs(whole).full(9)


def test_a_random_model_of_that_shape_decodes_and_is_timed(tmp_path: Path, monkeypatch) -> None:
    backbone = outlined("mamba2", tmp_path, random=True)
    assert max(check(backbone)) <= 1e-5
    monkeypatch.setattr(Backbone, "stop_ids", frozenset(range(backbone.vocab_size)))  # which end no timed answer
    result = compare(backbone, tokens=4, pairs=2)
    assert len(result.ours.runs) == len(result.theirs.runs) == 2
    assert result.spread[0] <= result.ratio <= result.spread[1]
