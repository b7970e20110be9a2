"Token dynamics: the criterion over random systems, rates, conformance, layers of several models, bad input."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from selectbench.core.conformance import check_method
from selectbench.core.vocabulary import sample_signals
from selectbench.nn.blocks import Mamba, block_lm
from selectbench.nn.scan import selective_scan
from selectbench.ssm.attention import scan_signals
from selectbench.ssm.dynamics import (
    DefiniteMamba,
    ReorderedMamba,
    convergent_limit,
    follow,
    layer_regime,
    observed_regime,
    predicted_regime,
    soft_sort,
    token_regime,
    token_velocity,
)

NAMES = ("scan_input", "scan_delta", "scan_a", "scan_b", "scan_c")
SIZE = st.floats(0.2, 2.0)
SIGNED = st.tuples(SIZE, st.sampled_from([-1, 1])).map(lambda p: p[0] * p[1])


@pytest.mark.parametrize("name", ("token_regime", "DefiniteMamba", "ReorderedMamba"))
def test_conforms(name): check_method(name)


@settings(max_examples=25, deadline=None)
@given(st.lists(SIGNED, min_size=1, max_size=4), SIGNED, SIGNED, SIZE)
def test_criterion_and_its_opposite(tokens, mu, step, decay):
    "The sign criterion tells what integration shows, and with the sign of mu turned round it never does."
    log_time, path = follow(np.reshape(tokens, (-1, 1)), [[mu]], [[step]], [decay])
    assert observed_regime(path) == predicted_regime(tokens, mu, step) != predicted_regime(tokens, -mu, step)
    assert (np.sign(path[-1, :, 0]) == np.sign(tokens)).all()


@settings(max_examples=10, deadline=None)
@given(st.lists(SIGNED, min_size=2, max_size=4), SIZE, SIGNED, SIZE)
def test_rate_of_convergence(tokens, mu, step, decay):
    log_time, path = follow(np.reshape(tokens, (-1, 1)), [[-mu]], [[step]], [decay], until=120)
    found = np.exp(log_time[-1]) * path[-1, :, 0] ** 2
    np.testing.assert_allclose(found, convergent_limit(len(tokens), -mu, decay), rtol=1e-2)


def test_velocity_is_a_selective_scan():
    rng = np.random.default_rng(0)
    x, write, read, step = (torch.from_numpy(rng.normal(size=s)) for s in ((7, 3), (5, 3), (5, 3), (3, 3)))
    decay, u = torch.from_numpy(rng.uniform(0.2, 2, 3)), x.T[None]
    y, _ = selective_scan(u, F.softplus(step @ u), -decay[:, None].repeat(1, 5), write @ u, read @ u)
    got = token_velocity(x.numpy(), (read.T @ write).numpy(), step.numpy(), decay.numpy())
    np.testing.assert_allclose(got, y[0].T.numpy(), rtol=1e-10)


def test_growth_is_that_of_the_system():
    "With the signals of a system of its own, growth is the derivative of the sum of squares."
    rng = np.random.default_rng(1)
    x, write, read, step = (rng.normal(size=s) for s in ((9, 3), (4, 3), (4, 3), (3, 3)))
    decay = rng.uniform(0.2, 2, 3)
    frame = token_regime(x, np.log1p(np.exp(x @ step.T)), -np.tile(decay[:, None], 4), x @ write.T, x @ read.T)
    v = token_velocity(x, read.T @ write, step, decay)
    later = ((x + 1e-7 * v) ** 2).sum(0)
    np.testing.assert_allclose(frame.growth, (np.log(later) - np.log((x**2).sum(0))) / 2e-7, rtol=1e-4)


def test_fast_and_slow_channels():
    "A channel whose step rises with its tokens is fast, one whose step falls is slow, a negative one converges."
    x = np.linspace(0.5, 2, 12)[:, None] * np.ones(3)
    delta = np.stack([x[:, 0], 3 - x[:, 0], x[:, 0]], 1)
    ones = np.ones((12, 1))
    frame = token_regime(x, delta, -np.ones((3, 1)), ones, ones)
    assert list(frame.regime) == ["fast divergence", "slow divergence", "fast divergence"]
    assert set(token_regime(x, delta, -np.ones((3, 1)), ones, -ones).regime) == {"convergent"}


def hub(kind, **options):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, num_hidden_layers=2, use_cache=False, **options)).eval()


JAMBA = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, num_experts=2, use_mamba_kernels=False,
             mamba_d_state=4, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1)


@pytest.mark.parametrize("kind, options, layers", (
    ("mamba", {"state_size": 4}, 2), ("falcon_mamba", {"state_size": 4}, 2), ("jamba", JAMBA, 1)))
def test_layers_of_hub_models(kind, options, layers):
    model = hub(kind, **options)
    frame = layer_regime(model)
    assert len(frame) == layers and (frame.positive + frame.negative == 4).all() and frame.balance.abs().max() <= 1
    for signals in scan_signals(model, np.arange(20)).values():
        assert np.isfinite(token_regime(**signals)[["growth", "outward", "slope"]]).all(axis=None)


def test_eigenvalues_are_those_of_the_whole_product():
    torch.manual_seed(1)
    mixer = Mamba(8, state=3)
    write, read = mixer.x_proj.weight.detach().double()[-6:].split(3)
    real = torch.linalg.eigvals(read.T @ write).real
    row = layer_regime(torch.nn.ModuleList([mixer])).iloc[0]
    assert (row.positive, row.negative) == ((real > 1e-9).sum(), (real < -1e-9).sum())


@pytest.mark.parametrize("kind, regime, counts", (("positive", "divergent", (4, 0)), ("mixed", "divergent", (2, 2)),
                                                  ("negative", "convergent", (0, 4))))
def test_definite_whatever_the_weights(kind, regime, counts):
    model = block_lm(32, mixer=DefiniteMamba, mixer_options={"eigenvalues": kind, "state": 4}, width=16)
    for p in model.parameters(): p.data = 3 * torch.randn_like(p)
    frame = layer_regime(model)
    assert (frame.regime == regime).all() and (frame[["positive", "negative"]] == list(counts)).all(axis=None)


def test_soft_sort_becomes_sort():
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.9], [4.0, 3.0, 2.0, 1.0]])
    sharp = soft_sort(scores, 1e-3)
    np.testing.assert_allclose((sharp @ scores[..., None])[..., 0], scores.sort(-1).values, atol=1e-6)
    np.testing.assert_allclose(soft_sort(scores).sum(-1), 1, rtol=1e-6)


def test_sharp_reordering_is_a_mamba_of_sorted_tokens():
    "With a hard order and no convolution, sorting the input of a plain Mamba gives the same, put back."
    torch.manual_seed(0)
    mixer = ReorderedMamba(8, state=4, conv=1, temperature=1e-9)
    plain = Mamba(8, state=4, conv=1)
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if "importance" not in k})
    hidden = torch.randn(1, 6, 8)
    inner = mixer.conv1d(mixer.in_proj(hidden).chunk(2, -1)[0])
    order = mixer.order(inner)[0].argmax(-1)
    assert sorted(order.tolist()) == list(range(6)) != order.tolist()
    torch.testing.assert_close(mixer(hidden)[:, order], plain(hidden[:, order]))


def test_importance_learns():
    mixer = ReorderedMamba(8, state=4)
    mixer(torch.randn(2, 6, 8)).square().sum().backward()
    assert mixer.importance.weight.grad.abs().max() > 0


@pytest.mark.parametrize("call, name", (
    (lambda: token_velocity(np.ones(3), [[1]], [[1]], [1]), "tokens"),
    (lambda: token_velocity(np.ones((3, 2)), np.eye(3), np.eye(2), [1, 1]), "product"),
    (lambda: token_velocity(np.ones((3, 1)), [[1]], [[np.nan]], [1]), "step"),
    (lambda: token_velocity(np.ones((3, 1)), [[1]], [[1]], [-1]), "decay"),
    (lambda: follow(np.zeros((3, 1)), [[1]], [[1]], [1]), "bound"),
    (lambda: predicted_regime([0.0, 1], 1, 1), "tokens"),
    (lambda: predicted_regime([1.0], 0, 1), "mu"),
    (lambda: convergent_limit(3, 1, 1), "mu"),
    (lambda: layer_regime(torch.nn.Linear(2, 2)), "model"),
    (lambda: soft_sort(torch.ones(3), 0), "temperature"),
    (lambda: ReorderedMamba(8, temperature=-1), "temperature"),
    (lambda: DefiniteMamba(8, eigenvalues="both"), "eigenvalues"),
    (lambda: DefiniteMamba(4, state=16, expand=1), "state"),
))
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}`"): call()


@pytest.mark.parametrize("name", NAMES)
def test_bad_signals_are_named(name):
    signals = sample_signals(NAMES)
    with pytest.raises(ValueError, match=f"`{name}`"): token_regime(**signals | {name: np.nan * signals[name]})
