"""Compiled blocks give the library's logits in every format and in chunks, with few operations."""

import copy
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import COMPILED, compiled_only, random_model, tiny
from offramp import Engine
from offramp.errors import BadInput, UnsupportedModel
from offramp.model.backbone import Backbone
from offramp.model.compiled.formats import FORMATS
from offramp.model.compiled.library import Model
from offramp.model.loading import check
from offramp.model.store import Store

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def compiled(family, format, store=None):
    """A tiny model in this format, and the library's own model with the same weights."""
    base = tiny(family)
    model = copy.deepcopy(base.model)
    if format == "bfloat16":
        model = model.bfloat16()
    backbone = Backbone(model, base.tokenizer, base.source)
    backbone.use_compiled_blocks(format, store)
    return backbone


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", COMPILED)
def test_logits_are_the_librarys_with_the_same_weights(family, format):
    backbone = compiled(family, format)
    full, cached = check(backbone)
    assert max(full, cached) <= {"float32": 1e-5, "bfloat16": 5e-2}.get(format, 1e-3)


@compiled_only
def test_quantised_weights_are_not_the_original_ones():
    changed = compiled("llama", "int8").model.state_dict()
    same = [name for name, tensor in tiny("llama").model.state_dict().items() if torch.equal(tensor, changed[name])]
    assert not any("proj" in name for name in same)


@torch.inference_mode()
def alone(backbone, ids):
    return backbone.forward(torch.tensor([ids]))[0]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", COMPILED)
@torch.inference_mode()
def test_chunks_give_bit_for_bit_what_single_tokens_give(family, format):
    backbone = compiled(family, format)
    ids = torch.randint(0, 256, (1, 23), generator=torch.Generator().manual_seed(2))

    def in_pieces(*sizes):
        state, out, at = backbone.state(), [], 0
        for size in sizes:
            h, step = backbone.embed(ids[:, at : at + size], at)
            out.append(backbone.logits(backbone.run(h, 0, backbone.n_blocks, state, step)))
            at += size
        return torch.cat(out, 1)

    one_by_one = in_pieces(*[1] * 23)
    assert torch.equal(one_by_one, in_pieces(23))
    assert torch.equal(one_by_one, in_pieces(4, 2, 9, 1, 7))


def test_a_family_without_compiled_blocks_says_so():
    with pytest.raises(UnsupportedModel, match="gpt2 has no compiled blocks in int8: there is no code for its family"):
        Backbone(copy.deepcopy(tiny("gpt2").model), tiny("gpt2").tokenizer, tiny("gpt2").source).use_compiled_blocks("int8")


# What the tiny model of a family does not have, and others of the family do.
VARIATIONS = {
    "no positions": ("granitemoehybrid", {"position_embedding_type": "nope"}),
    "a norm before the gate": ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}),
    "a norm after the gate": ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    "no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
}


EXPERTS = {
    "granitemoehybrid": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mamba", "mlp", "mamba"]},
}


@compiled_only
@pytest.mark.parametrize("variation", VARIATIONS)
def test_logits_of_other_models_of_a_family_are_the_librarys(variation):
    family, changes = VARIATIONS[variation]
    backbone = random_model(family, **changes)
    backbone.use_compiled_blocks("float32")
    assert max(check(backbone)) <= 1e-5


@pytest.mark.parametrize("family", EXPERTS)
def test_blocks_with_experts_run_as_the_librarys_own(family):
    backbone = random_model(family, **EXPERTS[family])
    with pytest.raises(UnsupportedModel, match="there is no compiled code for experts"):
        backbone.use_compiled_blocks("float32")
    assert max(check(backbone)) <= 1e-5


@compiled_only
def test_an_activation_without_compiled_code_is_refused():
    with pytest.raises(UnsupportedModel, match="there is no compiled code for the activation GELUActivation"):
        random_model("llama", hidden_act="gelu").use_compiled_blocks("float32")


@compiled_only
def test_shapes_that_do_not_fit_a_format_are_refused():
    import transformers

    config = copy.deepcopy(tiny("llama").config)
    config.intermediate_size = 40
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    backbone = Backbone(model, tiny("llama").tokenizer, tiny("llama").source)
    with pytest.raises(UnsupportedModel, match="groups of 32"):
        backbone.use_compiled_blocks("int4")


@compiled_only
def test_rotary_positions_that_change_with_the_length_are_refused():
    import transformers

    config = copy.deepcopy(tiny("llama").config)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(UnsupportedModel, match="change with the text's length"):
        Backbone(model, tiny("llama").tokenizer, tiny("llama").source).use_compiled_blocks("float32")


@compiled_only
def test_quantised_weights_are_read_back_from_the_store(tmp_path):
    path = tmp_path / "weights.safetensors"
    first = compiled("llama", "int4", Store(path))
    stamp = path.stat().st_mtime_ns
    second = compiled("llama", "int4", Store(path))
    assert path.stat().st_mtime_ns == stamp
    assert torch.equal(alone(first, [1, 2, 3]), alone(second, [1, 2, 3]))


class Counting(TorchDispatchMode):
    """Counts torch's operators, the tensors they allocate, and reads of a tensor from Python, which make a GPU wait."""

    def __init__(self):
        super().__init__()
        self.operators, self.allocated = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self.operators[func.overloadpacket.__name__] += 1
        outs = out if isinstance(out, tuple | list) else (out,)
        self.allocated += sum(isinstance(o, torch.Tensor) and o.untyped_storage().data_ptr() not in before for o in outs)
        return out


def calls_of(monkeypatch):
    """Counts the calls of the compiled library with a model."""
    calls, call = Counter(), Model.call

    def counted(self, name, *args):
        calls[name.removeprefix("offramp_")] += 1
        return call(self, name, *args)

    monkeypatch.setattr(Model, "call", counted)
    return calls


@compiled_only
@pytest.mark.parametrize("family", ["llama", "mamba2"])
@torch.inference_mode()
def test_a_decoded_token_takes_few_operators(family, monkeypatch):
    """Guard against slow-downs without a clock. Raise a number here only with a measurement that says why."""
    backbone = tiny(f"{family}/compiled")
    calls = calls_of(monkeypatch)
    logits = Backbone.logits
    monkeypatch.setattr(Backbone, "logits", lambda self, *a: (calls.update(["head"]), logits(self, *a))[1])
    stream = Engine(backbone, sampling=lambda logits, ids: int(logits.argmax())).stream([1, 2, 3], max_tokens=10)
    next(stream)
    calls.clear()
    with Counting() as counting:
        next(stream)
    reads = counting.operators["item"] + counting.operators["is_nonzero"]
    assert calls == {"head": 1, "logits": 1, "run": 1}
    assert reads == 2, "the choice, and whether the logits are finite"
    assert sum(counting.operators.values()) <= 32
    assert counting.allocated <= 12


@pytest.mark.parametrize("family", COMPILED)
@torch.inference_mode()
def test_the_number_of_threads_changes_no_bit(family: str) -> None:
    backbone, ids, threads = tiny(f"{family}/compiled"), torch.arange(40)[None], torch.get_num_threads()
    logits = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            logits.append(backbone.forward(ids))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@compiled_only
def test_threads_of_python_share_a_model():
    """Their texts outgrow its rotary pairs at about the same time."""
    engine, prompts = Engine(compiled("llama", "float32")), [[number, 2, 3] for number in range(4)]

    def answer(prompt):
        return engine.generate(prompt, max_tokens=300, end_ids=frozenset()).ids

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, prompts))
    assert together == [answer(prompt) for prompt in prompts]


@compiled_only
@pytest.mark.parametrize("format", FORMATS)
@torch.inference_mode()
def test_candidates_are_the_sketchs_likeliest_however_many_threads_and_rows(format: str) -> None:
    backbone, threads = compiled("llama", format), torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    h, reduce = torch.randn(1, 5, 32, generator=generator), torch.randn(32, 32, generator=generator)
    expand = torch.linalg.inv(reduce) + 0.1 * torch.randn(32, 32, generator=generator)
    read_out = backbone.sketched(reduce, expand, 20)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(read_out(h))
            assert torch.equal(found[-1], torch.cat([read_out(h[:, row : row + 1]) for row in range(5)], dim=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    chosen = found[0] > float("-inf")
    assert (chosen.sum(-1) == 20).all()
    assert torch.equal(found[0][chosen], backbone.logits(h)[chosen])
    estimates = backbone.final(h) @ reduce.T @ (backbone.head_weight() @ expand).T
    likeliest = torch.zeros_like(chosen).scatter(-1, estimates.topk(20).indices, True)
    assert (chosen & likeliest).sum() >= (100 if format == "float32" else 60)  # the others round the estimates


@pytest.mark.parametrize("family", ["llama", "mamba2", *(f"{family}/compiled" for family in COMPILED)])
@torch.inference_mode()
def test_no_hidden_states_have_no_logits(family):
    backbone = tiny(family)
    assert backbone.logits(torch.empty(0, 32)).shape == (0, backbone.vocab_size)
    reduce = torch.eye(32)
    assert backbone.sketched(reduce, reduce, 3)(torch.empty(0, 32)).shape == (0, backbone.vocab_size)
    assert backbone.head_of(torch.tensor([1, 5]))(torch.empty(0, 32)).shape == (0, 2)


@compiled_only
@pytest.mark.parametrize("format", ["float32", "bfloat16"])
@torch.inference_mode()
def test_keys_and_values_are_kept_in_the_dtype_that_was_asked_for(format):
    """Kept in float32, the logits are nearer to those of the library with the same weights in float32."""
    backbone, ids = compiled("llama", format), torch.arange(40)[None]
    wanted, errors = copy.deepcopy(backbone.model).float()(ids).logits, {}
    for dtype in ("bfloat16", "float32", "bfloat16"):
        backbone.keep_keys_in(dtype)
        state = backbone.state()
        h, step = backbone.embed(ids)
        errors[dtype] = (backbone.logits(backbone.run(h, 0, backbone.n_blocks, state, step)) - wanted).abs().mean()
        keys = state.kv[0].keys
        assert torch.equal(keys, keys.to(getattr(torch, dtype)).float())
    assert errors["float32"] < (0.01 if format == "float32" else 1) * errors["bfloat16"]


@pytest.mark.parametrize(("family", "dtype", "error"), [("llama", "int8", BadInput), ("gpt2", "float32", UnsupportedModel)])
def test_keys_and_values_that_cannot_be_kept_so_are_refused(family, dtype, error):
    with pytest.raises(error, match=dtype):
        tiny(family).keep_keys_in(dtype)


@compiled_only
def test_a_text_goes_on_with_keys_in_the_dtype_that_it_began_with():
    backbone = compiled("llama", "bfloat16")
    wanted = Engine(backbone).generate([1, 2, 3], max_tokens=40, end_ids=frozenset()).ids
    stream = Engine(backbone).stream([1, 2, 3], max_tokens=40, end_ids=frozenset())
    first = next(stream).id
    backbone.keep_keys_in("float32")
    assert [first, *(token.id for token in stream)] == wanted


@compiled_only
def test_an_engine_follows_its_backbone_to_other_blocks():
    backbone = compiled("llama", "float32")
    engine = Engine(backbone)
    answers = [engine.generate([1, 2, 3], max_tokens=20).ids]
    backbone.use_library_blocks()
    answers.append(engine.generate([1, 2, 3], max_tokens=20).ids)
    backbone.use_compiled_blocks("float32")
    answers.append(engine.generate([1, 2, 3], max_tokens=20).ids)
    assert answers[0] == answers[1] == answers[2]
