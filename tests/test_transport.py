"GOT-D and projektor: numbers from the authors' own functions, invariances, planted answers, bad input."
import numpy as np
import ot
import pytest

from selectbench.core.vocabulary import sample_signals
from selectbench.data.transport import (
    PerformanceModel,
    best_mixture,
    calibrated,
    counts,
    feature_cost,
    fit_performance,
    got_d,
    labelled_cost,
    projektor,
    size_weights,
    transport,
)

SIGNALS = ["embeddings", "y", "groups", "target_embeddings", "target_y", "mixtures", "mixture_sizes", "mixture_scores"]


def cloud(seed, n=40, q=11, d=4, shift=0.5):
    "A pool and a target, float32."
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)).astype("f4"), (rng.normal(size=(q, d)) + shift).astype("f4")


def planted(seed=0):
    "Arguments of `projektor`: three sources, source 0 like the target, source 1 with wrong labels, source 2 far away."
    rng = np.random.default_rng(seed)
    groups, y = np.repeat([0, 1, 2], 40), rng.integers(3, size=120)
    center = 4 * np.eye(3, 5)
    x = center[y] + rng.normal(size=(120, 5)) + 6 * (groups == 2)[:, None]
    label = np.where(groups == 1, (y + 1) % 3, y)
    target_y = rng.integers(3, size=31); z = center[target_y] + rng.normal(size=(31, 5))
    mixtures = np.tile([[i, j, 4 - i - j] for i in range(5) for j in range(5 - i)], (2, 1)) / 4
    sizes = np.repeat([20, 40], len(mixtures) // 2)
    model = PerformanceModel(labelled_cost(x, label, z, target_y), groups, (20, 40), np.zeros(0))
    scores = np.array([n**0.1 - 0.1 * model.distance(p)[0] for p, n in zip(mixtures, sizes, strict=True)])
    return x.astype("f4"), label, groups, z.astype("f4"), target_y, mixtures.astype("f4"), sizes, scores.astype("f4")


def test_calibration_is_that_of_lava():
    "`values` of LAVA's lava.py on the square roots of 1 to 6."
    theirs = [-0.9663644180449877, -0.46930814319727365, -0.08790344896233515, 0.23363558195501222, 0.51691715495476,
              0.7730232732948257]
    assert np.allclose(calibrated(np.sqrt(np.arange(1, 7))), theirs, rtol=0, atol=1e-14)
    assert calibrated(np.array([3.0])).tolist() == [0]


@pytest.mark.parametrize("size, theirs", [
    (500, 0.6645244354324275), (1200, 0.7724830143393394), (10_000, 1.0339436793633796)])
def test_size_scaling_is_that_of_projektor(size, theirs):
    "`Projector.project_performance` from 0.75 at 1,000 and 0.80 at 1,500."
    assert np.isclose(size_weights((1000, 1500), size) @ [0.75, 0.80], theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("epsilon", [0, 0.01, 0.1])
def test_prices_follow_the_plan(epsilon):
    "Mass and plan from the prices are POT's; examples without mass have prices too."
    x, z = cloud(0); cost = feature_cost(x, z); mass = np.random.default_rng(0).dirichlet(np.ones(40)); mass[:5] = 0
    mass /= mass.sum(); b = np.full(11, 1 / 11)
    distance, f, g = transport(cost, mass, epsilon=epsilon)
    assert np.isfinite(f).all()
    if not epsilon:
        assert np.isclose(distance, ot.emd2(mass, b, cost)) and (f[:, None] + g <= cost + 1e-12).all()
        return
    plan = mass[:, None] * b * np.exp((f[:, None] + g - cost) / (epsilon * cost.mean()))
    assert np.allclose(plan.sum(axis=1), mass) and np.allclose(plan.sum(axis=0), b, atol=1e-7)


def test_gradient_of_an_example_without_mass():
    "The exact distance falls or rises as the price says when mass comes to an example that had none."
    x, z = cloud(1, n=13, q=7); cost, b = feature_cost(x, z), np.full(7, 1 / 7)
    mass = np.r_[0, np.random.default_rng(1).dirichlet(np.ones(12))]
    distance, f, _ = transport(cost, mass, epsilon=0)
    moved = (1 - 1e-6) * mass; moved[0] = 1e-6
    assert np.isclose((ot.emd2(moved, b, cost) - distance) / 1e-6, f[0] - mass @ f, atol=1e-5)


def test_scale_and_shift_change_nothing():
    x, z = cloud(2)
    first = got_d(x, z, 40).index
    assert np.array_equal(first, got_d(8 * x, 8 * z, 40).index)
    assert np.array_equal(first[:10], got_d(x + 3, z + 3, 10).index)


def test_far_out_and_tight_pools_have_finite_scores():
    "Costs that would underflow in a plain kernel."
    x, z = cloud(3)
    for pool, target in ((1e4 * x, z), (x, z + 1000), (1e-6 * x, 1e-6 * z), (np.r_[x, 1e3 + x], z)):
        score = got_d(pool.astype("f4"), target.astype("f4"), 3).score
        assert np.isfinite(score).all() and abs(score.sum()) <= 1e-6 * abs(score).sum()


def test_choice_is_not_the_nearest():
    "A rare kind that the target has in plenty comes before copies of a common kind that lie on the target."
    pool = np.array([[0.0]] * 30 + [[5.0]] * 2, "f4"); target = np.array([[0.0], [4.0]], "f4")
    assert sorted(got_d(pool, target, 2).index) == [30, 31]
    assert feature_cost(pool, target).min(axis=1)[:30].max() == 0


def test_projektor_finds_the_source_like_the_target():
    pick = projektor(*planted(), 30)
    taken = np.bincount(planted()[2][pick.index], minlength=3)
    assert taken[0] >= 28 and np.isclose(pick.info["mixture"].sum(), 1)
    blind = projektor(*planted(), 30, label_weight=0)
    assert blind.info["distance"] < pick.info["distance"]


def test_wrong_labels_cost_only_with_label_weight():
    x, y, groups, z, w, *_ = planted()
    model = lambda weight: PerformanceModel(labelled_cost(x, y, z, w, label_weight=weight), groups, (1, 2), None)
    clean, wrong = np.eye(3)[0], np.eye(3)[1]
    gap = [model(weight).distance(wrong)[0] - model(weight).distance(clean)[0] for weight in (0, 1)]
    assert gap[1] > 5 * abs(gap[0])


def test_projektor_never_asks_for_more_than_there_is():
    args = planted()
    for k in (1, 50, 119, 120):
        pick = projektor(*args, k)
        assert len(set(pick.index.tolist())) == k
        assert abs(pick.info["mixture"] * k - np.bincount(args[2][pick.index], minlength=3)).max() < 1


def test_counts():
    rng = np.random.default_rng(0)
    for _ in range(200):
        room = rng.integers(0, 9, 5); k = int(rng.integers(1, room.sum() + 1)) if room.sum() else 0
        if not k: continue
        mixture = np.minimum(room / room.sum(), room / k)
        each = counts(mixture, k, room)
        assert each.sum() == k and (each <= room).all() and (abs(each - k * mixture) < 1).all()


def test_many_sizes_are_fitted_together():
    "With three sizes and performance linear in log N the middle one is met too."
    x, y, groups, z, w, mixtures, *_ = planted()
    sizes = np.resize([20, 30, 80], len(mixtures)); cost = labelled_cost(x, y, z, w)
    model = fit_performance(cost, groups, mixtures, sizes, 0.3 + 0.1 * np.log(sizes), degree=1)
    assert np.allclose([model.predict(mixtures[0], n)[0] for n in (30, 500)], 0.3 + 0.1 * np.log([30, 500]))


def test_best_mixture_of_a_line_is_the_nearest_source():
    x, y, groups, z, w, *_ = planted()
    model = PerformanceModel(labelled_cost(x, y, z, w), groups, (20, 40), np.array([[[-1.0], [0]]] * 2), degree=0)
    assert np.isclose(best_mixture(model, 40, np.full(3, 0.5)).max(), 0.5)
    assert model.distance(best_mixture(model, 40, np.ones(3)))[0] <= model.distance(np.eye(3)[0])[0] + 1e-9


@pytest.mark.parametrize("change, word", [
    ({"mixture_sizes": np.full(12, 50)}, "mixture_sizes"),
    ({"mixture_sizes": np.r_[np.zeros(6, int), np.full(6, 50)]}, "mixture_sizes"),
    ({"groups": np.zeros(40, int)}, "groups"),
    ({"target_embeddings": np.zeros((0, 6), "f4"), "target_y": np.zeros(0, int)}, "target_embeddings"),
    ({"mixture_scores": np.r_[np.nan, np.zeros(11)].astype("f4")}, "mixture_scores"),
])
def test_bad_pilots_are_refused(change, word):
    signals = sample_signals(SIGNALS) | change
    with pytest.raises(ValueError, match=f"`{word}`"): projektor(*[signals[name] for name in SIGNALS], 5)


@pytest.mark.parametrize("options, word", [({"degree": -1}, "degree"), ({"epsilon": -0.1}, "epsilon")])
def test_bad_options_are_refused(options, word):
    with pytest.raises(ValueError, match=f"`{word}`"): projektor(*sample_signals(SIGNALS).values(), 5, **options)


def test_got_d_refuses_an_empty_target():
    x, _ = cloud(0)
    with pytest.raises(ValueError, match="`target_embeddings`"): got_d(x, np.zeros((0, 4), "f4"), 3)
    with pytest.raises(ValueError, match="`epsilon`"): got_d(x, x, 3, epsilon=-1)


def test_equal_embeddings_and_a_target_inside_the_pool():
    flat = np.ones((8, 3), "f4")
    for target in (flat, np.eye(3, dtype="f4")): assert got_d(flat, target, 3).index.tolist() == [0, 1, 2]
    x, _ = cloud(0)
    inside = got_d(x, x[:7], 40)
    assert np.isfinite(inside.score).all() and got_d(x, x, 3, epsilon=0).info["distance"] < 1e-9
