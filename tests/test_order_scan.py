"Scan orders: permutations and neighbours, code lengths one by one, the policy's gradient by enumeration, the control."
from itertools import permutations

import numpy as np
import pytest
import torch

from selectbench.core.conformance import check_method
from selectbench.order.ranking import plackett_luce_log_likelihood
from selectbench.order.scan import (
    MEASURES,
    MODELS,
    SCANS,
    PatchReader,
    against,
    bigram_bits,
    code_length,
    compressible_scan,
    compression_correlation,
    draw_orders,
    learn_order,
    patch_codes,
    patches,
    policy_loss,
    read_digits,
    scan,
    scan_study,
    start_logits,
    temperature_at,
)

PATHS = np.array(list(permutations(range(4))))
TINY = {"steps": 4, "batch": 8, "width": 8}


def gaps(name, h, w): return np.abs(np.diff(np.stack(np.divmod(scan(name, h, w).index, w)), axis=1)).sum(0)


@pytest.mark.parametrize("name", SCANS)
def test_every_scan_visits_every_cell_once(name):
    for h, w in [(1, 1), (1, 7), (7, 1), (2, 5), (3, 3), (6, 4), (8, 8)]:
        order = scan(name, h, w)
        assert order.is_ordering and sorted(order.index) == list(range(h * w))


def test_neighbours():
    for h, w in [(1, 6), (6, 1), (3, 5), (4, 4), (5, 2), (9, 7)]:
        assert (gaps("snake", h, w) == 1).all() and (gaps("spiral", h, w) == 1).all()
    for side in (2, 4, 8, 16): assert (gaps("hilbert", side, side) == 1).all()


def test_scans_by_hand():
    assert scan("row", 2, 3).index.tolist() == [0, 1, 2, 3, 4, 5]
    assert scan("column", 2, 3).index.tolist() == [0, 3, 1, 4, 2, 5]
    assert scan("snake", 2, 3).index.tolist() == [0, 1, 2, 5, 4, 3]
    assert scan("spiral", 3).index.tolist() == [0, 1, 2, 5, 8, 7, 6, 3, 4]
    assert scan("hilbert", 2).index.tolist() == [0, 2, 3, 1]
    assert scan("diagonal", 3).index.tolist() == [6, 3, 7, 0, 4, 8, 1, 5, 2]
    assert scan("zigzag", 3).index.tolist() == [0, 1, 3, 6, 4, 2, 5, 7, 8]


def test_hilbert_in_a_larger_square_is_what_is_left_of_it():
    whole = np.stack(np.divmod(scan("hilbert", 8).index, 8), axis=1)
    inside = whole[(whole[:, 0] < 5) & (whole[:, 1] < 6)]
    assert np.array_equal(inside @ [6, 1], scan("hilbert", 5, 6).index)


def test_patches_by_hand():
    image = np.arange(24, dtype=np.float32)[None]
    assert patches(image, 2, height=4)[0].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11],
                                                       [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]]


def test_bigram_code_one_by_one():
    codes = np.random.default_rng(0).integers(0, 4, (20, 7))
    counts, bits = np.full((5, 4), 0.5), 0.0
    for row in codes:
        for before, now in zip([4, *row[:-1]], row, strict=True):
            bits -= np.log2(counts[before, now] / counts[before].sum())
            counts[before, now] += 1
    assert np.isclose(bigram_bits(codes), bits)


def test_a_hidden_chain_compresses_best_in_its_own_order():
    rng = np.random.default_rng(1)
    chain = np.maximum.accumulate(np.where(rng.random((300, 12)) < 0.3, rng.integers(0, 9, (300, 12)), 0), axis=1)
    order = rng.permutation(12)
    hidden = np.empty_like(chain)
    hidden[:, order] = chain
    own = code_length(hidden, order)
    for _ in range(20):
        other = code_length(hidden, rng.permutation(12))
        assert all(own[m] < other[m] for m in MEASURES)


@pytest.mark.parametrize("name", ["snake", "spiral", "column"])
def test_compressible_scan_finds_the_planted_one(name):
    rng = np.random.default_rng(2)
    keep, values = rng.random((300, 20)) < 0.85, rng.integers(0, 6, (300, 20))
    for j in range(1, 20): values[:, j] = np.where(keep[:, j], values[:, j - 1], values[:, j])
    hidden = np.empty_like(values)
    hidden[:, scan(name, 4, 5).index] = values
    for measure in MEASURES:
        found = compressible_scan(np.float32(hidden.T), measure=measure)
        assert found.info["scan"] == name and np.array_equal(found.index, scan(name, 4, 5).index)


def gradients(temperature, baseline, exact):
    "(expected step of REINFORCE over all 24 orders, gradient of the expected reward)."
    theta = torch.tensor([0.3, -0.6, 0.1, -1.0], dtype=torch.float64, requires_grad=True)
    reward = torch.from_numpy(np.random.default_rng(3).normal(size=24))
    scores = lambda t: -torch.stack([policy_loss(t, torch.from_numpy(z[None]), torch.ones(1, dtype=t.dtype))
                                     for z in PATHS])
    chance = scores(theta / temperature).exp()
    assert torch.isclose(chance.sum(), torch.ones((), dtype=torch.float64))
    loss = policy_loss(theta, torch.from_numpy(PATHS), 24 * chance.detach() * (reward - baseline), temperature,
                       exact=exact)
    return [torch.autograd.grad(v, theta, retain_graph=True)[0] for v in (-loss, (chance * reward).sum())]


@pytest.mark.parametrize("baseline", [0.0, 2.0])
def test_reinforce_is_the_gradient_of_the_expected_reward(baseline):
    for temperature, exact in ((1.0, False), (1.0, True), (0.3, True), (3.0, True)):
        found, true = gradients(temperature, baseline, exact)
        assert torch.allclose(found, true, atol=1e-9) and true.abs().max() > 1e-3
    found, true = gradients(0.3, baseline, False)
    assert not torch.allclose(found, true, atol=1e-2)


def test_log_probability_is_plackett_luce():
    theta = np.random.default_rng(4).normal(size=4)
    found = [-policy_loss(torch.from_numpy(theta), torch.from_numpy(z[None]), torch.ones(1)).item() for z in PATHS]
    assert np.allclose(found, plackett_luce_log_likelihood(PATHS, theta))


def test_orders_are_drawn_at_their_temperature():
    theta = np.array([0.0, -0.5, -1.0, -0.2])
    drawn = draw_orders(theta, 0.5, 20_000, seed=1)
    for z in PATHS[::5]:
        expected = np.exp(plackett_luce_log_likelihood(z[None], theta / 0.5)[0])
        assert abs((drawn == z).all(1).mean() - expected) < 0.015
    assert (draw_orders(theta, 1e-6, 5) == np.argsort(-theta)).all()


def test_start_and_temperature():
    order = scan("spiral", 4).index
    assert np.array_equal(np.argsort(-start_logits(order)), order)
    heat = [temperature_at(i, 9, 0.2) for i in range(9)]
    assert np.isclose(max(heat), heat[4]) and np.isclose(heat[4], 0.2)
    assert np.allclose(heat, heat[::-1]) and min(heat) > 0


@pytest.mark.parametrize("model", MODELS)
def test_only_the_controls_are_blind_to_order(model):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net, x = PatchReader(9, 4, 3, model=model, width=8).double(), torch.randn(5, 9, 4).double()
    orders = [torch.from_numpy(scan(n, 3).index.copy()) for n in ("row", "spiral", "column")]
    with torch.no_grad(): first, *rest = [net(x, z) for z in orders]
    blind = all(torch.allclose(first, r, atol=1e-10) for r in rest)
    assert blind == (model in ("control", "located"))
    with torch.no_grad(): each = net(x, torch.stack(orders[:1] * 5))
    assert torch.allclose(each, first)


def test_training_is_blind_or_not_as_the_reader_is():
    state = torch.get_rng_state()
    for model, blind in (("control", True), ("located", True), ("mamba", False), ("window", False)):
        a, b = (read_digits(order, model, 0, **TINY) for order in ("row", "spiral"))
        assert all(np.isclose(a[k], b[k], atol=1e-9) for k in a) == blind
    assert torch.equal(state, torch.get_rng_state())
    by_name, by_order = (read_digits(o, "mamba", 0, **TINY) for o in ("snake", scan("snake", 4).index))
    assert by_name == by_order


def test_a_policy_that_never_acts_is_training_in_its_start():
    found = learn_order("mamba", 1, "spiral", wait=1.0, active=0.0, **TINY)
    plain = read_digits("spiral", "mamba", 1, **TINY)
    assert found["moved"] == 0 and np.array_equal(found["order"], scan("spiral", 4).index)
    assert all(np.isclose(found[k], plain[k], rtol=1e-5) for k in plain)


@pytest.mark.parametrize("options", [{}, {"per_image": True, "exact": True}])
def test_a_policy_that_acts_moves(options):
    found = learn_order("mamba", 1, wait=0.0, active=1.0, policy_rate=0.2, **options, **TINY)
    assert sorted(found["order"]) == list(range(16)) and 0 < found["moved"] <= 1
    assert np.array_equal(found["order"], np.argsort(-found["logits"], kind="stable"))


def test_a_baseline_far_below_flattens_the_logits_whatever_the_orders():
    options = {"wait": 0.0, "active": 1.0, "policy_rate": 0.05, "steps": 12, "batch": 8, "width": 8}
    near, far = (learn_order("control", 1, momentum=0.9, baseline=b, **options) for b in (None, 0.0))
    spread = np.ptp(start_logits(np.arange(16)))
    assert np.ptp(far["logits"]) < 0.8 * spread and np.ptp(near["logits"]) > np.ptp(far["logits"])


def test_study_and_its_summaries():
    frame = scan_study(("control",), (0, 1), scans=("row", "spiral"), randoms=2, policy={}, **TINY)
    assert set(frame.order) == {"row", "spiral", "random 0", "random 1", "compressed", "best of 2", "learned",
                                "learned, fresh"}
    assert frame.groupby("seed").accuracy.nunique().eq(1).all()
    table = against(frame).set_index("order")
    assert (table.gain.abs() < 1e-12).all() and (table.better == 0).all()
    assert compression_correlation(frame).rho.isna().all()


def test_bad_input():
    for change, what in (({"name": "rows"}, "name"), ({"height": 0}, "height")):
        with pytest.raises(ValueError, match=f"`{what}`"): scan(**{"name": "row", "height": 2} | change)
    with pytest.raises(ValueError, match="`patch`"): patches(np.zeros((2, 64)), 3)
    with pytest.raises(ValueError, match="`images`"): patches(np.zeros(64))
    with pytest.raises(ValueError, match="`codes`"): code_length(np.full((2, 4), 256), np.arange(4))
    with pytest.raises(ValueError, match="`order`"): code_length(np.zeros((2, 4), int), np.arange(3))
    with pytest.raises(ValueError, match="`order`"): code_length(np.zeros((2, 4), int), [0, 1, 1, 2])
    with pytest.raises(ValueError, match="`width`"): compressible_scan(np.ones((6, 3), np.float32), width=4)
    with pytest.raises(ValueError, match="`measure`"): compressible_scan(np.ones((6, 3), np.float32), measure="gzip")
    with pytest.raises(ValueError, match="`temperature`"): draw_orders(np.zeros(3), 0, 1)
    with pytest.raises(ValueError, match="`model`"): PatchReader(4, 4, 3, model="gru")
    with pytest.raises(ValueError, match="`order`"): read_digits(np.arange(15), **TINY)


def test_codes_are_clusters():
    cut = np.repeat(np.float32([[0, 0], [5, 5], [9, 0]]), 4, axis=0).reshape(3, 4, 2)
    codes = patch_codes(cut, 3)
    assert (codes == codes[:, :1]).all() and len(np.unique(codes)) == 3


@pytest.mark.parametrize("name", ["compressible_scan", "PatchReader"])
def test_conformance(name): check_method(name)
