"""The format `file`: each tensor runs in the type that its file has it in, with the file's values."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

import offramp
from models import SMALL, byte_tokenizer, compiled_only
from offramp.errors import UnsupportedModel
from offramp.model.backbone import Backbone
from offramp.model.checkpoint import Gguf, Values, held_in
from offramp.model.compiled.panels import PANELS
from offramp.model.compiled.weights import Stack
from offramp.model.hub import Source
from offramp.model.selfcheck import check
from offramp.model.store import Store
from test_weights import gguf_rows

SHAPE = SMALL | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "num_hidden_layers": 2,
}
MATRICES = {
    "attn_q": (256, 256),
    "attn_k": (128, 256),
    "attn_v": (128, 256),
    "attn_output": (256, 256),
    "ffn_gate": (512, 256),
    "ffn_up": (512, 256),
    "ffn_down": (256, 512),
}
MIXED = {
    "attn_q": "Q5_0", "attn_k": "Q5_0", "attn_v": "Q8_0", "attn_output": "BF16", "ffn_gate": "Q4_K", "ffn_up": "Q6_K",
    "ffn_down": "F16", "token_embd": "Q5_0", "output": "Q8_0",
}  # fmt: skip


def write_gguf(file, kinds):
    """A llama's tensors with random numbers, each in the type that `kinds` gives it."""
    writer = GGUFWriter(file, "llama")

    def add(name, kind, rows, columns):
        if kind in PANELS:
            raw = gguf_rows(kind, rows, columns)[0].numpy()
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[kind])
            return
        values = np.random.default_rng(1).normal(0, 0.05, (rows, columns)).astype(np.float32)
        if kind == "BF16":
            raw = torch.from_numpy(values).bfloat16().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, values.astype(np.float16) if kind == "F16" else values)

    for block in range(SHAPE["num_hidden_layers"]):
        for name, shape in MATRICES.items():
            add(f"blk.{block}.{name}.weight", kinds[name], *shape)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(256, np.float32))
    for name in ("token_embd", "output"):
        add(f"{name}.weight", kinds[name], SHAPE["vocab_size"], 256)
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def backbone_of(file, kinds):
    """The backbone of such a file, in the format `file`; the library's model has the file's values in float32."""
    write_gguf(file, kinds)
    config = transformers.LlamaConfig(**SHAPE | {"num_key_value_heads": 2}, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    checkpoint = Gguf(file, model)
    for name, parameter in model.named_parameters():
        parameter.data = checkpoint.rows(name, 0, len(parameter)).float()
    backbone = Backbone(model, byte_tokenizer(), Source.of_weights("file", model))
    backbone.use_compiled_blocks("file", Store(), Values(model, lambda: checkpoint))
    return backbone


@compiled_only
@pytest.mark.parametrize("kind", [*PANELS, "F32", "F16", "BF16"])
def test_a_file_of_one_type_gives_the_librarys_logits(kind, tmp_path):
    backbone = backbone_of(tmp_path / "x.gguf", dict.fromkeys(MIXED, kind))
    check(backbone)
    ids = torch.arange(20)[None]
    wanted = backbone.model(ids).logits
    assert (backbone.forward(ids) - wanted).abs().max() <= 1e-1 * wanted.abs().max()


@compiled_only
def test_a_file_of_several_types_keeps_each(tmp_path):
    backbone = backbone_of(tmp_path / "x.gguf", MIXED)
    full, cached = check(backbone)
    assert max(full, cached) < 1e-3
    fields = [backbone.runtime.blocks[0].attention.fields, backbone.runtime.blocks[0].mlp.fields]
    qkv, gate_up = fields[0]["qkv"].weight, fields[1]["gate_up"]
    assert [piece.name for piece in qkv.pieces] == ["Q5_0", "Q8_0"]
    assert [piece.name for piece in getattr(gate_up, "weight", gate_up).pieces] == ["Q4_K", "Q6_K"]
    assert isinstance(qkv, Stack)
    assert (backbone.runtime.embedding.name, backbone.runtime.head.name) == ("Q5_0", "Q8_0")
    assert backbone.precision == "int8"
    # Each token is decoded alone, as in a chunk, and from its embedding in C as in Python.
    answer = offramp.Engine(backbone).generate([1, 2, 3], max_tokens=8)
    ids = torch.tensor([[1, 2, 3, *answer.ids]])
    assert backbone.forward(ids)[0, 2:-1].argmax(-1).tolist() == answer.ids


@compiled_only
def test_another_type_is_refused_in_a_sentence(tmp_path):
    kinds = dict.fromkeys(MIXED, "F32")
    write_gguf(tmp_path / "x.gguf", kinds)
    config = transformers.LlamaConfig(**SHAPE | {"num_key_value_heads": 2}, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    checkpoint = Gguf(tmp_path / "x.gguf", model)
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoint._places[name] = replace(checkpoint._places[name], kind=GGMLQuantizationType.IQ2_XXS)
    backbone = Backbone(model, byte_tokenizer(), Source.of_weights("file", model))
    with pytest.raises(UnsupportedModel, match="type IQ2_XXS, which offramp cannot run as they are") as refused:
        backbone.use_compiled_blocks("file", Store(), Values(model, lambda: checkpoint))
    assert "--dtype bfloat16" in refused.value.hint


def test_what_a_folder_holds(tmp_path):
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    (held,) = held_in(tmp_path)
    assert held.kind == "BF16"
    assert held.bytes == 2 * held.entries


def test_sizes_of_all_types_are_those_of_the_package_gguf_or_a_little_more():
    for kind, made in PANELS.items():
        entries, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        assert 0 <= made.layout.row_bytes(1024) - size * 1024 // entries <= 64
