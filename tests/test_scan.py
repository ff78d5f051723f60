"""The scan, the causal convolution and the mixer made of both: the same numbers however the tokens are cut up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.exits import Mixer
from offramp.scan import CHUNK, causal_conv, scan

LENGTHS = st.one_of(st.integers(1, 200), st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1]))
STRENGTHS = st.tuples(*[st.floats(math.log10(1e-3), math.log10(30))] * 2).map(sorted)  # of dt * |A|, as powers of ten


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine, threads that wait for each other make these many small products fifty times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def scans(draw):
    """The arguments of `scan`, in float64, with dt * |A| spread over a drawn range between 1e-3 and 30."""
    batch, heads, dims, states = (draw(st.integers(1, top)) for top in (3, 3, 4, 5))
    tokens, (low, high) = draw(LENGTHS), draw(STRENGTHS)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    A = -(0.5 + 7.5 * uniform(heads))
    dt = 10 ** (low + (high - low) * uniform(batch, tokens, heads)) / -A
    h = normal(batch, heads, dims, states) if draw(st.booleans()) else None
    return (
        normal(batch, tokens, heads, dims),
        dt,
        A,
        normal(batch, tokens, states),
        normal(batch, tokens, states),
        normal(heads),
        h,
    )


def token_by_token(x, dt, A, B, C, D, h):
    if h is None:
        h = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[2])
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)
        h = torch.einsum("bh,bhpn->bhpn", decay, h) + torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bhpn,bn->bhp", h, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), h


def off(got, want):
    """Largest difference, as a share of the largest number wanted (or of 1)."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max().clamp(min=1))


def part(arguments, piece, h):
    x, dt, A, B, C, D, _ = arguments
    return x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], D, h


@settings(max_examples=40, deadline=None)
@given(scans())
def test_a_scan_equals_the_recurrence_token_by_token(arguments):
    y, h = scan(*arguments)
    want_y, want_h = token_by_token(*arguments)
    assert off(y, want_y) < 1e-9
    assert off(h, want_h) < 1e-9


@settings(max_examples=40, deadline=None)
@given(scans(), st.floats(0, 1))
def test_a_scan_in_pieces_equals_a_scan_at_once(arguments, where):
    tokens = arguments[0].shape[1]
    cut = round(where * tokens)
    y, h = scan(*arguments)
    pieces, state = [], arguments[-1]
    for piece in (slice(0, cut), slice(cut, tokens)):
        if piece.start < piece.stop:
            out, state = scan(*part(arguments, piece, state))
            pieces.append(out)
    assert off(torch.cat(pieces, dim=1), y) < 1e-9
    assert off(state, h) < 1e-9


@settings(max_examples=40, deadline=None)
@given(scans())
def test_a_scan_in_float32_is_within_1e_4_of_float64(arguments):
    single = [value if value is None else value.float() for value in arguments]
    y, h = scan(*single)
    want_y, want_h = scan(*[value if value is None else value.double() for value in single])
    assert y.dtype == h.dtype == torch.float32
    assert off(y.double(), want_y) < 1e-4
    assert off(h.double(), want_h) < 1e-4


@settings(max_examples=25, deadline=None)
@given(scans(), st.floats(0, 1))
def test_a_scan_never_looks_ahead(arguments, where):
    tokens = arguments[0].shape[1]
    seen = max(1, round(where * tokens))
    y, _ = scan(*arguments)
    y_seen, _ = scan(*part(arguments, slice(0, seen), arguments[-1]))
    assert off(y_seen, y[:, :seen]) < 1e-9


def test_the_strongest_decay_over_a_whole_chunk_stays_finite():
    ones = torch.ones(1, 2 * CHUNK, 2)
    y, h = scan(ones[..., None], 30 * ones, -torch.ones(2), ones, ones, torch.ones(2))
    assert torch.isfinite(y).all()
    assert torch.isfinite(h).all()


def test_a_scan_leaves_the_state_it_was_given_alone():
    h = torch.ones(1, 2, 3, 4)
    for tokens in (1, 5):
        x, dt, maps = torch.ones(1, tokens, 2, 3), torch.ones(1, tokens, 2), torch.ones(1, tokens, 4)
        scan(x, dt, -torch.ones(2), maps, maps, torch.ones(2), h)
        assert torch.equal(h, torch.ones(1, 2, 3, 4))


@st.composite
def convolutions(draw):
    batch, tokens, channels, width = (draw(st.integers(low, top)) for low, top in ((1, 3), (1, 12), (1, 5), (2, 5)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = ((batch, tokens, channels), (channels, width), (channels,), (batch, width - 1, channels))
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


@settings(max_examples=25, deadline=None)
@given(convolutions())
def test_the_convolution_equals_a_naive_loop(arguments):
    x, weight, bias, window = arguments
    y, _ = causal_conv(x, weight, bias, window)
    for b in range(x.shape[0]):
        inputs = [*window[b], *x[b]]
        for t in range(x.shape[1]):
            total = bias.clone()
            for lag in range(weight.shape[1]):
                total += weight[:, lag] * inputs[t + lag]
            assert off(y[b, t], total / (1 + torch.exp(-total))) < 1e-12


@settings(max_examples=25, deadline=None)
@given(convolutions())
def test_the_convolution_token_by_token_equals_all_at_once(arguments):
    x, weight, bias, window = arguments
    y, last = causal_conv(x, weight, bias, window)
    outputs, carried = [], window
    for t in range(x.shape[1]):
        out, carried = causal_conv(x[:, t : t + 1], weight, bias, carried)
        outputs.append(out)
    assert off(torch.cat(outputs, dim=1), y) < 1e-12
    assert torch.equal(carried, last)


@settings(max_examples=25, deadline=None)
@given(convolutions())
def test_the_window_carried_is_the_last_inputs(arguments):
    x, weight, bias, window = arguments
    _, carried = causal_conv(x, weight, bias, window)
    assert torch.equal(carried, torch.cat([window, x], dim=1)[:, -window.shape[1] :])


def mixer_both_ways(dtype, seed, tokens, scale):
    """How far a mixer token by token is from one call: outputs, window, state."""
    torch.manual_seed(0)
    mixer = Mixer(width=12, inner=32, out=7, states=5, head=8).eval().to(dtype)
    u = (scale * torch.randn(2, tokens, 12, generator=torch.Generator().manual_seed(seed))).to(dtype)
    with torch.inference_mode():
        whole, (window, h) = mixer(u)
        outputs, memory = [], None
        for t in range(tokens):
            out, memory = mixer(u[:, t : t + 1], memory)
            outputs.append(out)
    return off(torch.cat(outputs, dim=1), whole), off(memory[0], window), off(memory[1], h)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 90), st.floats(0.1, 5))
def test_a_mixer_token_by_token_equals_a_mixer_in_one_call(seed, tokens, scale):
    assert max(mixer_both_ways(torch.float64, seed, tokens, scale)) < 1e-9


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 90), st.floats(0.1, 5))
def test_so_it_does_in_float32_to_1e_5_on_inputs_as_large_as_its_norm_lets_through(seed, tokens, scale):
    assert max(mixer_both_ways(torch.float32, seed, tokens, scale)) < 1e-5
