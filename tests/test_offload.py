"""A model that accelerate has spread over memory and disk decodes as in memory, and reads no weights in vain."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import accelerate
import pytest
import torch
import transformers

import offramp
from helpers import modest_exits, refused
from models import BLOCKS, SMALL, byte_tokenizer, saved, tiny
from offramp import Engine, Policy
from offramp.errors import UnsupportedModel
from offramp.extras.offload import values_of
from offramp.model.families import FAMILIES
from offramp.model.hooks import device_of
from offramp.model.loading import wrap

THREE = ["llama", "mamba2", "bamba"]
IDS = [83, 111, 109, 101, 32, 119, 111, 114, 100, 115]
CPU = torch.device("cpu")
WAYS = ["dispatch_model", "cpu_offload", "disk_offload"]


def device_map(family: str) -> dict[str, str]:
    """The upper half of the blocks on disk, and everything else in memory."""
    model, row = tiny(family).model, FAMILIES[family]
    trunk = getattr(model, row.trunk)
    places = {f"{row.trunk}.{name}": "cpu" for name, _ in trunk.named_children() if name != row.blocks}
    blocks = {f"{row.trunk}.{row.blocks}.{index}": "cpu" if index < BLOCKS // 2 else "disk" for index in range(BLOCKS)}
    return places | blocks | {"lm_head": "cpu"}


def spread(way: str, family: str, folder, **settings):
    """A copy of the tiny model, spread in one of accelerate's ways."""
    model = copy.deepcopy(tiny(family).model)
    if way == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=CPU)
    if way == "disk_offload":
        return accelerate.disk_offload(model, folder / "offload", execution_device=CPU)
    return accelerate.dispatch_model(model, device_map(family), offload_dir=folder / "offload", **settings)


class Counted(Mapping):
    """A hook's map of weights that counts what is read, by the weight's name in the model."""

    def __init__(self, weights, path, reads):
        self.weights, self.path, self.reads = weights, path, reads

    def __getitem__(self, name):
        self.reads[f"{self.path}.{name}"] += 1
        return self.weights[name]

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


def counted(model) -> Counter[str]:
    """How often each offloaded weight of the model is read from now on."""
    reads: Counter[str] = Counter()
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and getattr(hook, "offload", False):
            hook.weights_map = Counted(hook.weights_map, path, reads)
    return reads


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", THREE)
def test_full_depth_is_what_the_library_generates(way, family, tmp_path):
    model = spread(way, family, tmp_path)
    ids = torch.tensor([IDS])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=257)
    backbone = wrap(model, byte_tokenizer())
    answer = Engine(backbone).generate(IDS, max_tokens=12)
    assert answer.ids == theirs[0, len(IDS) :].tolist()
    assert any(parameter.is_meta for parameter in model.parameters())  # they have been let go again


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_fill_of_every_family_answers_as_in_memory(family, tmp_path):
    exits, policy = modest_exits(family), Policy((0.5,) * 3)
    backbone = wrap(spread("disk_offload", family, tmp_path), byte_tokenizer())
    assert backbone.source.fingerprint == tiny(family).source.fingerprint
    for fill in ("project", "copy", "freeze", "defer"):
        if not refused(fill, family):
            ours = Engine(backbone, exits, policy, fill).generate(IDS, max_tokens=8)
            assert ours.tokens == Engine(tiny(family), exits, policy, fill).generate(IDS, max_tokens=8).tokens, fill


@pytest.mark.parametrize(
    ("family", "fill", "read"),
    [
        ("llama", "copy", set()),
        ("mamba2", "freeze", set()),
        ("mamba2", "copy", set()),
        ("bamba", "copy", set()),
        ("llama", "project", {"input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}),
        (
            "mamba2",
            "project",
            {"norm.weight", *(f"mixer.{name}" for name in ("A_log", "D", "dt_bias"))}
            | {f"mixer.{name}" for name in ("conv1d.weight", "conv1d.bias", "in_proj.weight")},
        ),
    ],
)
def test_a_token_that_leaves_reads_of_the_deep_blocks_only_what_its_fill_needs(family, fill, read, tmp_path):
    model = spread("dispatch_model", family, tmp_path)
    batch = Engine(wrap(model, byte_tokenizer()), modest_exits(family), Policy((1.0, 0.0, 1.0)), fill).batch()
    batch.add(IDS, max_tokens=4)
    batch.step()  # the prompt goes through all blocks
    reads = counted(model)
    tokens = [event.token for event in batch.run() if hasattr(event, "token")]
    assert {token.exit_block for token in tokens} == {BLOCKS // 2}
    where = f"{FAMILIES[family].trunk}.{FAMILIES[family].blocks}."
    names = {f"{where}{index}.{name}" for name in read for index in range(BLOCKS // 2, BLOCKS)}
    assert reads == dict.fromkeys(names, len(tokens))


@pytest.mark.parametrize("fill", ["project", "verify"])
def test_generate_of_a_model_with_a_device_map_takes_exits(fill, tmp_path):
    folder = saved(tiny("llama"), tmp_path / "model")
    settings = {"device_map": device_map("llama"), "offload_folder": tmp_path / "offload"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    backbone, exits = wrap(model, byte_tokenizer()), modest_exits("llama")
    bridge = offramp.decoding(exits, Policy((0.5,) * 3), fill)
    output = model.generate(torch.tensor([IDS]), custom_generate=bridge, max_new_tokens=8, pad_token_id=257)
    assert (
        output[0, len(IDS) :].tolist() == Engine(backbone, exits, Policy((0.5,) * 3), fill).generate(IDS, max_tokens=8).ids
    )


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_heads_read_out_as_in_memory(way, tmp_path):
    backbone, memory = wrap(spread(way, "llama", tmp_path), byte_tokenizer()), tiny("llama")
    h, rows = torch.randn(1, 1, memory.hidden_size), torch.tensor([7, 3, 200])
    assert torch.equal(backbone.logits(h), memory.logits(h))
    assert torch.equal(backbone.logits(h, rows), memory.logits(h, rows))
    assert torch.equal(backbone.head_of(rows)(h), memory.head_of(rows)(h))
    assert torch.equal(backbone.final(h), memory.final(h))
    assert torch.equal(backbone.head_weight(), memory.head_weight())
    sketch = torch.eye(memory.hidden_size), torch.eye(memory.hidden_size)
    assert torch.equal(backbone.sketched(*sketch, 5)(h), memory.sketched(*sketch, 5)(h))
    assert backbone.device == device_of(backbone.head) == CPU
    assert backbone.source.sha256 == memory.source.sha256


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_tied_weights_are_counted_once_in_the_fingerprint(way, tmp_path):
    config = transformers.AutoConfig.for_model("llama", **SMALL, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    expected = wrap(copy.deepcopy(model), byte_tokenizer()).source.fingerprint
    if way == "cpu_offload":
        model = accelerate.cpu_offload(model, execution_device=CPU)
    else:
        model = accelerate.disk_offload(model, tmp_path / "offload", execution_device=CPU)
    for _ in range(2):  # the second time, each tensor is one of its own
        assert wrap(model, byte_tokenizer()).source.fingerprint == expected


def test_a_block_that_is_brought_in_whole_can_be_filled(tmp_path):
    model = spread("dispatch_model", "bamba", tmp_path, preload_module_classes=["BambaDecoderLayer"])
    exits, policy = modest_exits("bamba"), Policy((0.5,) * 3)
    ours = Engine(wrap(model, byte_tokenizer()), exits, policy).generate(IDS, max_tokens=8)
    assert ours.ids == Engine(tiny("bamba"), exits, policy).generate(IDS, max_tokens=8).ids


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny("llama").config)
    with pytest.raises(UnsupportedModel, match=r"model\.embed_tokens\.weight is on the meta device"):
        wrap(model, byte_tokenizer())


def test_compiled_blocks_are_refused(tmp_path):
    backbone = wrap(spread("dispatch_model", "llama", tmp_path), byte_tokenizer())
    with pytest.raises(UnsupportedModel, match="no compiled blocks in float32: accelerate brings its weights in"):
        backbone.use_compiled_blocks("float32")


def test_values_are_read_without_a_run(tmp_path):
    model, memory = spread("dispatch_model", "llama", tmp_path), tiny("llama").model
    values = values_of(model)
    for ours, theirs in zip(model.parameters(), memory.parameters(), strict=True):
        assert torch.equal(values.whole(ours, torch.float32), theirs)


def test_held_weights_are_in_memory_and_the_others_are_mapped(tmp_path, own_cache):
    def mapped():
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {Path(line.split()[-1]).stem for line in lines if line.endswith(".bin") and str(own_cache) in line}

    folder = str(saved(tiny("llama"), tmp_path / "model"))
    whole = offramp.load(folder, "float32", held=1 << 30).backbone
    assert mapped() == set()
    sizes = {file.stem: file.stat().st_size for file in own_cache.glob("formats/*/*.bin")}
    part = offramp.load(folder, "float32", held=sizes["ends"] + 2 * sizes["0"]).backbone
    assert mapped() == {"2", "3", "4", "5"}
    expected = Engine(tiny("llama")).generate(IDS, max_tokens=8).ids
    assert [Engine(backbone).generate(IDS, max_tokens=8).ids for backbone in (whole, part)] == [expected, expected]
