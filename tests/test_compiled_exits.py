"""Gates and read-outs that the C library computes give what their modules give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import compiled_only
from offramp.exits.gates import GATES
from offramp.exits.gates import compiled as compiled_gate
from offramp.exits.parts import ExitPart
from offramp.exits.readouts import READOUTS, DeepAdapter
from offramp.exits.readouts import compiled as compiled_readout
from offramp.model.compiled.formats import Int4
from offramp.model.compiled.library import CompiledPart, Model
from offramp.model.compiled.weights import Int8, Weight

pytestmark = compiled_only
HIDDEN, WIDTH, TOKENS = 64, 32, 300  # more tokens than pass together in C


@pytest.fixture(scope="module")
def model() -> Model:
    """A model without blocks: what the library's calls need."""
    table = torch.zeros(8, HIDDEN)
    head = Weight.of(table)
    return Model(CompiledPart("ends", head=head, norm=torch.ones(HIDDEN), embedding=head, eps=1e-5), [])


def states(seed: int, width: int = HIDDEN) -> Tensor:
    """Hidden states (tokens, width), of dims of several sizes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, width, generator=g) * torch.logspace(-1, 1, width) + torch.linspace(-2, 2, width)


def fitted(part: ExitPart) -> ExitPart:
    """The part as if it had been trained."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    if norm := getattr(part, "norm", None):
        norm.fit(states(1))
    if jump := getattr(part, "jump", None):
        jump.spread.copy_(torch.linspace(0.1, 3, HIDDEN))
    return part.eval().requires_grad_(False)


def close(found: Tensor, wanted: Tensor, exact: bool) -> None:
    """Assert that numbers differ as float32 rounds, or else by no more than weights and rows of few bits explain."""
    if exact:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - wanted).norm() <= 0.15 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", GATES)
def test_a_compiled_gate_gives_the_modules_logits(kind: str, dtype: torch.dtype, model: Model) -> None:
    gate, h, logits = fitted(GATES[kind](HIDDEN, WIDTH)), states(2), torch.empty(TOKENS)
    part = compiled_gate(gate, dtype)
    assert part is not None
    model.call("offramp_model_fits", part.pointer)
    model.call("offramp_ask", part.pointer, h.data_ptr(), TOKENS, logits.data_ptr())
    close(logits, gate(h[None])[0][0], dtype == torch.float32)
    assert logits.std() > 0.1


READERS = [(kind, reads) for kind in READOUTS for reads in ((1, 2) if kind == "deep" else (0,)) if kind != "mamba"]


@pytest.mark.parametrize("weights", [(Weight, torch.float32), (Weight, torch.bfloat16), (Int8,), (Int4,)])
@pytest.mark.parametrize("tail", [0, 1])
@pytest.mark.parametrize(("kind", "reads"), READERS)
def test_a_compiled_read_out_gives_the_modules_states(kind: str, reads: int, tail: int, weights, model: Model) -> None:
    adapter = DeepAdapter(HIDDEN, WIDTH, tail, reads) if reads else READOUTS[kind](HIDDEN, WIDTH, tail)
    readout, h, out = fitted(adapter), states(2), torch.empty(TOKENS, HIDDEN)
    deep = torch.cat([states(3 + index) for index in range(reads)], 1) if reads else None
    part = compiled_readout(readout, *weights)
    assert part is not None
    model.call("offramp_model_fits", part.pointer)
    places = h.data_ptr(), None if deep is None else deep.data_ptr()
    model.call("offramp_read_out", part.pointer, *places, TOKENS, out.data_ptr())
    wanted = readout((h if deep is None else torch.cat([h, deep], 1))[None])[0][0]
    close(out, wanted, weights == (Weight, torch.float32))


def test_maps_that_cannot_be_cut_into_groups_stay_as_they_are() -> None:
    part = compiled_readout(fitted(READOUTS["ffn"](HIDDEN, 40, 1)), Int4)
    assert part is not None
    assert [type(weight) for weight in part.weights] == [Int4, Weight]


def test_a_read_out_that_sees_the_tokens_before_is_not_compiled() -> None:
    assert compiled_readout(READOUTS["mamba"](HIDDEN, WIDTH), Weight) is None
