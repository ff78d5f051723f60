"""The scans, the causal convolution and the mixers give the same numbers however the tokens are cut into chunks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.exits.parts import MambaBlock
from offramp.model.scan import CHUNK, SPAN, causal_conv, scan, selective_scan

LENGTHS = st.one_of(st.integers(1, 300), st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1]))
STRENGTHS = st.tuples(*[st.floats(math.log10(1e-3), math.log10(30))] * 2).map(sorted)  # of dt * |A|, as powers of ten


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: on a busy machine, threads that wait for each other make these small products fifty times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def scans(draw, kinds=("mamba1", "mamba2")):
    """A scan and its float64 arguments, the state last (it may be None).

    dt * |A| is spread over a drawn range between 1e-3 and 30.
    """
    kind = draw(st.sampled_from(kinds))
    batch, heads, dims, states, groups = (draw(st.integers(1, top)) for top in (3, 3, 4, 5, 2))
    tokens, (low, high) = draw(LENGTHS), draw(STRENGTHS)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    if kind == "mamba1":
        function, groups, channels, A = selective_scan, (), (dims,), -(0.5 + 7.5 * uniform(dims, states))
        rate = -A.amin(1)  # dt is drawn for the strongest decay of each channel
    else:
        function, groups, channels, A = scan, (groups,), (heads * groups, dims), -(0.5 + 7.5 * uniform(heads * groups))
        rate = -A
    dt = 10 ** (low + (high - low) * uniform(batch, tokens, channels[0])) / rate
    maps = [normal(batch, tokens, *groups, states) for _ in "BC"]
    h = normal(batch, *channels, states) if draw(st.booleans()) else None
    return function, [normal(batch, tokens, *channels), dt, A, *maps, normal(channels[0]), h]


def token_by_token(function, arguments):
    """The recurrence as the papers write it; Mamba-1 has heads of one dim."""
    x, dt, A, B, C, D, h = arguments
    batch, tokens = x.shape[:2]
    if function is selective_scan:
        x, B, C, D = x[..., None], B[:, :, None], C[:, :, None], D[:, None]
        h = None if h is None else h[:, :, None]
    else:
        A, D = A[:, None].expand(-1, B.shape[-1]), D[:, None].expand(-1, x.shape[-1])
    heads = x.shape[2]
    B, C = (part.repeat_interleave(heads // part.shape[2], dim=2) for part in (B, C))
    if h is None:
        h = x.new_zeros(batch, heads, x.shape[3], B.shape[3])
    outputs = []
    for t in range(tokens):
        h = torch.exp(dt[:, t, :, None] * A)[:, :, None] * h
        h = h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]) + D * x[:, t])
    y = torch.stack(outputs, dim=1)
    return (y.squeeze(3), h.squeeze(2)) if function is selective_scan else (y, h)


def off(got, want):
    """The largest difference, as a share of the largest expected number (or of 1)."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max().clamp(min=1))


def part(arguments, piece, h):
    x, dt, A, B, C, D, _ = arguments
    return x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], D, h


@settings(max_examples=80, deadline=None)
@given(scans())
def test_a_scan_equals_the_recurrence_token_by_token(case):
    function, arguments = case
    y, h = function(*arguments)
    want_y, want_h = token_by_token(function, arguments)
    assert off(y, want_y) < 1e-9
    assert off(h, want_h) < 1e-9


@settings(max_examples=60, deadline=None)
@given(scans(), st.floats(0, 1))
def test_a_scan_in_pieces_equals_a_scan_at_once(case, where):
    function, arguments = case
    tokens = arguments[0].shape[1]
    cut = round(where * tokens)
    y, h = function(*arguments)
    pieces, state = [], arguments[-1]
    for piece in (slice(0, cut), slice(cut, tokens)):
        if piece.start < piece.stop:
            out, state = function(*part(arguments, piece, state))
            pieces.append(out)
    assert off(torch.cat(pieces, dim=1), y) < 1e-9
    assert off(state, h) < 1e-9


@settings(max_examples=80, deadline=None)
@given(scans())
def test_a_scan_in_float32_is_within_1e_5_of_the_recurrence_in_float64(case):
    function, arguments = case
    single = [value if value is None else value.float() for value in arguments]
    y, h = function(*single)
    double = [value if value is None else value.double() for value in single]
    want_y, want_h = token_by_token(function, double)
    assert y.dtype == h.dtype == torch.float32
    assert off(y.double(), want_y) < 1e-5
    assert off(h.double(), want_h) < 1e-5


def test_a_text_longer_than_a_span_is_no_different():
    torch.manual_seed(0)
    tokens = SPAN + CHUNK + 3
    maps = [torch.randn(1, tokens, 1, 3).double() for _ in "BC"]
    dt = torch.rand(1, tokens, 2).double()
    arguments = [
        torch.randn(1, tokens, 2, 4).double(),
        dt,
        -torch.ones(2).double(),
        *maps,
        torch.ones(2).double(),
        None,
    ]
    for got, want in zip(scan(*arguments), token_by_token(scan, arguments), strict=True):
        assert off(got, want) < 1e-9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_of_mamba_ssm_is_checked_against_ours():
    pytest.importorskip("mamba_ssm")
    from offramp.model.scan import _kernel

    assert _kernel() is not None


@settings(max_examples=25, deadline=None)
@given(scans(), st.floats(0, 1))
def test_a_scan_never_looks_ahead(case, where):
    function, arguments = case
    tokens = arguments[0].shape[1]
    seen = max(1, round(where * tokens))
    y, _ = function(*arguments)
    y_seen, _ = function(*part(arguments, slice(0, seen), arguments[-1]))
    assert off(y_seen, y[:, :seen]) < 1e-9


def test_the_strongest_decay_over_a_whole_chunk_stays_finite():
    ones = torch.ones(1, 2 * CHUNK, 2)
    maps = ones[:, :, None]
    y, h = scan(ones[..., None], 30 * ones, -torch.ones(2), maps, maps, torch.ones(2))
    assert torch.isfinite(y).all()
    assert torch.isfinite(h).all()


def test_a_scan_leaves_the_state_it_was_given_alone():
    h = torch.ones(1, 2, 3, 4)
    for tokens in (1, 5):
        x, dt, maps = torch.ones(1, tokens, 2, 3), torch.ones(1, tokens, 2), torch.ones(1, tokens, 1, 4)
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
    """How far outputs, window and state of a mixer that runs token by token are from those of one call."""
    torch.manual_seed(0)
    mixer = MambaBlock(width=12, inner=32, out=7, states=5, head=8).eval().to(dtype)
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
def test_a_mixer_token_by_token_is_within_1e_5_of_one_call_in_float32(seed, tokens, scale):
    assert max(mixer_both_ways(torch.float32, seed, tokens, scale)) < 1e-5
