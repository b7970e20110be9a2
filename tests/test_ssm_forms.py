"Forms: each identity over random layers, the two architectures, the spectrum of models, bad input."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from selectbench.core.conformance import check_method
from selectbench.core.vocabulary import sample_signals
from selectbench.nn.scan import selective_scan, ssd_scan
from selectbench.ssm.attention import scan_signals
from selectbench.ssm.forms import (
    Form,
    LinearAttention,
    QLSTM,
    exponential_features,
    gated_form,
    run,
    scan_form,
    separable_form,
    softmax_form,
    transition_spectrum,
)

SEEDS = st.integers(0, 10_000)
SIZES = st.tuples(*(st.integers(1, 6) for _ in range(4)))  # tokens, inputs, features, outputs


def drawn(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


@pytest.mark.parametrize("name", ("transition_spectrum", "qlstm", "dsf_linear_attention"))
def test_conforms(name): check_method(name)


@settings(max_examples=30, deadline=None)
@given(SEEDS, SIZES)
def test_softmax_attention(seed, sizes):
    t, d, k, p = sizes
    u, q, keys, values = drawn(seed, (t, d), (t, k), (t, k), (p, d))
    form = softmax_form(q, keys, values)
    direct = F.scaled_dot_product_attention(*map(torch.from_numpy, (q, keys, u @ values.T)), is_causal=True)
    np.testing.assert_allclose(run(form, u), direct.numpy(), atol=1e-10)
    assert form.state_size == t * p


@settings(max_examples=30, deadline=None)
@given(SEEDS, SIZES, st.booleans())
def test_separable_attention(seed, sizes, summed):
    t, d, n, p = sizes
    u, q, keys, values = drawn(seed, (t, d), (t, n), (t, n), (p, d))
    q, keys, eta = np.exp(q), np.exp(keys), np.exp(q[:, 0])
    weight = np.tril(q @ keys.T)
    weight /= weight.sum(1, keepdims=True) if summed else eta[:, None]
    form = separable_form(q, keys, values, None if summed else eta)
    np.testing.assert_allclose(run(form, u), weight @ u @ values.T, rtol=1e-8, atol=1e-8)
    assert form.state_size == n * p


@settings(max_examples=30, deadline=None)
@given(SEEDS, SIZES)
def test_selective_scan(seed, sizes):
    x, i, h, _ = sizes
    u, delta, a, b, c, skip = drawn(seed, (x, i), (x, i), (i, h), (x, h), (x, h), i)
    delta, a = np.exp(delta), -np.exp(a)
    given_ = (u.T[None], delta.T[None], a, b.T[None], c.T[None], skip)
    y, _ = selective_scan(*(torch.from_numpy(np.ascontiguousarray(v)) for v in given_))
    np.testing.assert_allclose(run(scan_form(delta, a, b, c, skip), u), y[0].T.numpy(), rtol=1e-8, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(SEEDS, SIZES)
def test_ssd_scan(seed, sizes):
    x, heads, h, p = sizes
    u, delta, a, b, c = drawn(seed, (x, heads, p), (x, heads), heads, (x, h), (x, h))
    delta, a = np.exp(delta), -np.exp(a)
    given_ = (u[None], delta[None], a, b[None, :, None], c[None, :, None])
    y, _ = ssd_scan(*map(torch.from_numpy, given_), chunk=2)
    form = scan_form(delta.repeat(p, 1), np.tile(a.repeat(p)[:, None], h), b, c)
    np.testing.assert_allclose(run(form, u.reshape(x, -1)), y[0].flatten(1).numpy(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("transition", ("sigmoid", "reversed"))
def test_whole_qlstm(transition):
    "The layer's output from its form, and the same form from a loop over the gates."
    torch.manual_seed(0)
    layer = QLSTM(6, transition=transition).double()
    hidden = torch.randn(1, 9, 6, dtype=torch.float64)
    with torch.no_grad():
        gate, x = layer.in_proj(hidden).chunk(2, -1)
        x = layer.conv1d(x.mT)[..., :9].mT
        y = run(gated_form(*(m[0].numpy() for m in layer.matrices(x))), x[0].numpy())
        np.testing.assert_allclose(layer.out_proj(F.gelu(gate) * torch.from_numpy(y)).numpy(), layer(hidden).numpy(),
                                   atol=1e-10)


@pytest.mark.parametrize("normalizer", ("exp", "sum"))
def test_whole_linear_attention(normalizer):
    torch.manual_seed(0)
    layer = LinearAttention(6, normalizer=normalizer, feature_dim=4).double()
    hidden = torch.randn(1, 9, 6, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = (x.numpy() for x in layer.qkv(hidden)[0].split(layer.parts, -1))
        phi = (lambda x: np.where(x > 0, x + 1, np.exp(x))) if normalizer == "sum" else lambda x: x
        eta = None if normalizer == "sum" else layer.eta(hidden)[0, :, 0].exp().numpy()
        y = run(separable_form(phi(q), phi(k), np.eye(6), eta), v)
        np.testing.assert_allclose(layer.out_proj(torch.from_numpy(y)).numpy(), layer(hidden)[0].numpy(), atol=1e-10)


@pytest.mark.parametrize("layer", (QLSTM(8), QLSTM(8, transition="sigmoid"), LinearAttention(8, heads=2),
                                   LinearAttention(8, normalizer="sum", feature_dim=4)))
def test_causal(layer):
    hidden = torch.randn(2, 7, 8)
    changed = hidden.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(layer(hidden)[:, :4], layer(changed)[:, :4])


def test_features_are_the_series():
    q, k = drawn(0, (4, 3), (5, 3))
    exact = np.exp(q @ k.T / np.sqrt(3))
    errors = [np.abs(exponential_features(q, r) @ exponential_features(k, r).T - exact).max() for r in (0, 2, 6, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6
    assert exponential_features(q, 2).shape[1] == 10


def test_reversed_sigmoid_is_the_transition_of_s6():
    layer = QLSTM(4)
    x = torch.randn(1, 5, 8)
    z = layer.gates(x).chunk(3, -1)[0]
    layer.power.data.fill_(1.7)
    torch.testing.assert_close(layer.matrices(x)[0], torch.exp(-1.7 * F.softplus(z)))


def test_spectrum_of_a_known_scan():
    frame = transition_spectrum(np.full((6, 2), 0.5), np.array([[-1.0, -2.0], [-0.1, -0.4]]))
    np.testing.assert_allclose(frame.memory, (2, 20))
    np.testing.assert_allclose(frame.low, np.exp([-1, -0.2]))
    np.testing.assert_allclose(frame.high, np.exp([-0.5, -0.05]))


MAMBA2 = dict(state_size=4, num_heads=8, head_dim=8, n_groups=1, chunk_size=16)


@pytest.mark.parametrize("kind, options", (("mamba", {"state_size": 4}), ("mamba2", MAMBA2)))
def test_forms_of_hub_models(kind, options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, num_hidden_layers=1, use_cache=False, **options)).eval()
    for signals in scan_signals(model, np.arange(12)).values():
        frame = transition_spectrum(signals["scan_delta"], signals["scan_a"])
        form = scan_form(*(signals[f"scan_{k}"] for k in ("delta", "a", "b", "c")))
        np.testing.assert_allclose(frame["mean"], form.transition.reshape(12, len(frame), -1).mean((0, 2)), rtol=1e-6)


ONE = np.ones((3, 2))


@pytest.mark.parametrize("call, name", (
    (lambda: Form(ONE, np.ones((3, 1, 2)), np.ones((3, 1, 2))), "write"),
    (lambda: run(gated_form(ONE, ONE, ONE), np.ones((3, 3))), "u"),
    (lambda: softmax_form(ONE, np.ones((4, 2)), ONE), "keys"),
    (lambda: softmax_form(ONE, ONE, np.ones(3)), "values"),
    (lambda: separable_form(ONE, np.ones((3, 1)), ONE), "queries"),
    (lambda: separable_form(ONE, ONE, ONE, np.zeros(3)), "normalizer"),
    (lambda: exponential_features(ONE, -1), "order"),
    (lambda: scan_form(ONE, np.ones((2, 3)), ONE, ONE), "scan_a"),
    (lambda: scan_form(ONE, np.eye(2), ONE, np.ones((3, 1))), "scan_c"),
    (lambda: gated_form(ONE, np.nan * ONE, ONE), "write"),
    (lambda: QLSTM(8, transition="tanh"), "transition"),
    (lambda: QLSTM(0), "width"),
    (lambda: LinearAttention(8, normalizer="none"), "normalizer"),
    (lambda: LinearAttention(8, heads=3), "heads"),
))
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}`"): call()


@pytest.mark.parametrize("name", ("scan_delta", "scan_a"))
def test_bad_signals_are_named(name):
    signals = sample_signals(("scan_delta", "scan_a"))
    for value in (np.nan * signals[name], -signals[name], signals[name][0], signals[name].astype(int)):
        with pytest.raises(ValueError, match=f"`{name}`"): transition_spectrum(**signals | {name: value})
