"""Transferability scores and LOVM against the numbers of the authors' own programs, and what they must refuse.

tests/data/ped_reference.npz: random features, and what the official repositories of LogME (thuml/LogME@56551ca) and
PED (lixiaotong97/PED@e5af6e7) return on them. tests/data/lovm_reference.csv: what orrzohar/LOVM@418cdcd prints."""
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from selectbench.model.transfer import (
    _left_out,
    _measures,
    displaced,
    encoder_shelf,
    fine_tune,
    h_score,
    h_value,
    leep,
    log_evidence,
    logme,
    lovm,
    lovm_nested,
    n_leep,
    n_leep_value,
    ped,
    pretext,
)
from selectbench.pools.fetch import available
from selectbench.pools.published import by_dataset
from selectbench.pools.published import lovm as lovm_pool

DATA = Path(__file__).parent / "data"
GROUPS = {"G": [3, 4, 5, 6], "C": [1, 2], "INB": [0]}
needs_lovm = pytest.mark.skipif(not available("lovm"), reason="needs SELECTBENCH_DATA")
theirs = pd.read_csv(DATA / "lovm_reference.csv")


@pytest.fixture(scope="module")
def reference(): return dict(np.load(DATA / "ped_reference.npz"))


def test_logme_is_the_official_number(reference):
    ours = logme(reference["features"], reference["y"], 5).score
    assert np.allclose(ours, reference["logme"], atol=1e-9)


def test_wide_features_follow_the_official_older_routine_and_correct_the_newer(reference):
    "30 examples, 50 columns: log alpha counts once per direction that the features have, not once per column."
    f, y, (n, d) = reference["wide"], reference["wide_y"], reference["wide"].shape[1:]
    ours = logme(f, y, 1).score
    surplus = (d - n) / (2 * n) * np.log(reference["wide_alphas"]).mean(1)
    assert np.allclose(ours + surplus, reference["wide_logme"], atol=1e-6)
    settled = [log_evidence(x, y, n_iter=1000, tol=1e-9) for x in f]
    short = np.array(settled) - reference["wide_icml"]
    assert (short > 0).all() and (short < .04).all()                               # it stops at a change of 1 %
    assert np.argmax(settled) == 2 and np.argmax(reference["wide_logme"]) == 0     # the surplus reverses the order


def test_leep_is_the_official_number(reference):
    assert np.allclose(leep(reference["probs"], reference["y"], 2).score, reference["leep"], atol=1e-6)


def test_one_step_of_ped_moves_features_as_the_official_program(reference):
    f, g = reference["features"][1].astype(float), reference["reference"][1].astype(float)
    ours = displaced(f, reference["y"], reference=g, step=1., n_steps=1)
    assert np.allclose(ours, reference["one_step"], atol=1e-9)


@pytest.mark.parametrize("nsigma", [.3, .6, 2.])
@pytest.mark.parametrize("step", [.1, 1., 2.])
def test_ped_is_the_official_number(reference, nsigma, step):
    ours = ped(reference["features"], reference["y"], 3, reference=reference["reference"], nsigma=nsigma, step=step)
    assert np.allclose(ours.score, reference[f"ped_{nsigma}_{step}"], atol=1e-7)


def table(target):
    "responses f32[23, 35], model_features f32[23, 35, 7], the data sets."
    p = lovm_pool()
    return by_dataset(p, target).astype(np.float32), by_dataset(p, "features"), np.array(p.group_names)


def same(name, other): return set(name.split("+")) == set(other.split("+"))


@needs_lovm
@pytest.mark.parametrize("target", ["acc1", "mean_per_class_recall"])
def test_lovm_reproduces_both_published_tables(target):
    y, x, _ = table(target)
    ours = lovm(y, x, groups=GROUPS, direct=0).groupby("features")[["recall", "tau", "l1"]].mean()
    part = theirs[(theirs.target == target) & theirs.question.isin(["model_rank", "model_pred"])]
    assert len(part) == 14
    for row in part.itertuples():
        got = ours.loc[next(n for n in ours.index if same(n, row.features))]
        for name in ("recall", "tau", "l1"):
            want = getattr(row, name)
            assert np.isnan(want) or abs(got[name] - want) < .002, (row, got)


@needs_lovm
@pytest.mark.parametrize("target", ["acc1", "mean_per_class_recall"])
def test_the_same_regression_ranks_data_sets_as_published(target):
    "Axes exchanged. INB alone predicts one number for all data sets: there the program's order is the alphabet's."
    y, x, _ = table(target)
    for row in theirs[(theirs.target == target) & (theirs.question == "dataset_rank")].itertuples():
        if row.features == "INB": continue
        columns = [c for g in row.features.split("+") for c in GROUPS[g]]
        order = _left_out(y.T.astype(float), x.transpose(1, 0, 2)[..., columns].astype(float))
        got = _measures(order, order, y.T.astype(float), 5)
        assert abs(got["recall"].mean() - row.recall) < .002 and abs(got["tau"].mean() - row.tau) < .002, row


@needs_lovm
def test_best_subset_on_the_evaluation_is_the_published_one():
    y, x, _ = table("mean_per_class_recall")
    each = lovm(y, x, groups={str(i): [i] for i in range(7)}, direct=0)
    ours = each.groupby("features")[["recall", "tau", "l1"]].mean().round(3)
    for row in theirs[theirs.question.str.endswith("_best")].itertuples():
        allowed = {c for g in row.features.split("+") for c in GROUPS[g]}
        inside = ours[[set(map(int, n.split("+"))) <= allowed for n in ours.index]]
        best = inside.sort_values(["recall", "tau"]).iloc[-1]
        if row.question == "model_pred_best": assert abs(inside.l1.min() - row.l1) < .002
        else: assert abs(best.recall - row.recall) < .002 and abs(best.tau - row.tau) < .002, row


@needs_lovm
def test_nested_never_sees_the_pair_it_predicts():
    "Another accuracy for one model changes no prediction for it, and with it none of its places."
    y, x, names = table("mean_per_class_recall")
    y, x = y[names != "imagenet1k"][:6, :12], x[names != "imagenet1k"][:6, :12, :3]
    from selectbench.model.transfer import _nested
    subsets = [list(s) for size in (1, 2, 3) for s in combinations(range(3), size)]
    x = x.astype(float)
    changed = y.astype(float).copy(); changed[:, 4] = 1 - changed[:, 4]; changed[2] = 0
    for before, after in zip(_nested(y.astype(float), x, subsets), _nested(changed, x, subsets), strict=True):
        assert np.allclose(before[:, 2, 4], after[:, 2, 4]) and not np.allclose(before[:, 1, 3], after[:, 1, 3])


rng = np.random.default_rng(0)
features, y = rng.normal(size=(4, 30, 5)).astype(np.float32), np.arange(30) % 3
probs = rng.dirichlet(np.ones(4), (4, 30)).astype(np.float32)
SCORES = {logme: features, h_score: features, n_leep: features, ped: features, leep: probs}
each_score = pytest.mark.parametrize("score", SCORES, ids=lambda s: s.card.name)


@each_score
def test_one_class_is_refused(score):
    with pytest.raises(ValueError, match="`y`"): score(SCORES[score], np.zeros(30, int), 1)


@each_score
def test_a_class_with_a_single_example_and_any_class_numbers_are_fine(score):
    odd = np.where(np.arange(30) == 7, 9, 2 * (y % 2) - 1)
    assert np.isfinite(score(SCORES[score], odd, 2).score).all()


@each_score
def test_one_model_is_a_choice_of_one(score):
    chosen = score(SCORES[score][:1], y, 1)
    assert chosen.index.tolist() == [0] and np.isfinite(chosen.score).all()


@pytest.mark.parametrize("score", [logme, h_score, n_leep, ped], ids=lambda s: s.card.name)
@pytest.mark.parametrize("value", [0., 1., 1e4, .1])
def test_constant_features_know_nothing(score, value):
    "They score below features that show the class."
    constant = np.full((1, 30, 5), value, np.float32)
    clear = np.eye(5, dtype=np.float32)[None, y] * max(value, 1) + features[:1] / 10
    chosen = score(np.concatenate([constant, clear]), y, 1)
    assert np.isfinite(chosen.score).all() and chosen.index[0] == 1
    if score is h_score: assert chosen.score[0] == 0
    if score is n_leep: assert np.isclose(chosen.score[0], -np.log(3))


@pytest.mark.parametrize("value", [.1, .3, 1e4 / 3])
def test_rounding_of_a_mean_is_no_feature(value):
    assert h_value(np.full((37, 3), value), np.arange(37) % 3) == 0


def test_leep_ignores_columns_of_zeros():
    padded = np.concatenate([probs, np.zeros((4, 30, 3), np.float32)], axis=2)
    assert np.allclose(leep(padded, y, 1).score, leep(probs, y, 1).score)


def test_as_many_columns_as_examples_saturate_the_h_score():
    assert np.isclose(h_value(rng.normal(size=(20, 40)), np.arange(20) % 4), 3)


def test_too_few_examples_for_the_mixture():
    with pytest.raises(ValueError, match="`ratio`"): n_leep_value(rng.normal(size=(20, 3)), np.arange(20) % 5)
    assert np.isfinite(n_leep_value(rng.normal(size=(20, 3)), np.arange(20) % 5, ratio=2))


def test_ped_takes_any_score_and_checks_the_reference():
    moved = ped(features, y, 2, base=h_value)
    assert np.allclose(moved.score, [h_value(displaced(f, y), y) for f in features])
    for bad in (features[:3], features[..., :4], features[0]):
        with pytest.raises(ValueError, match="`reference`"): ped(features, y, 1, reference=bad)


def test_centres_that_coincide_do_not_push():
    mirrored = np.concatenate([features[0, :10], -features[0, :10]] * 2).astype(float)
    assert np.allclose(displaced(mirrored, np.repeat([0, 1], 20), step=1), mirrored)


@pytest.mark.parametrize("analysis", [lovm, lovm_nested], ids=lambda a: a.card.name)
def test_lovm_refuses_small_tables_and_unknown_columns(analysis):
    responses, described = rng.random((6, 8)).astype(np.float32), rng.normal(size=(6, 8, 3)).astype(np.float32)
    for m in (1, 5):
        with pytest.raises(ValueError, match="`responses` must hold more than `top`"):
            analysis(responses[:, :m], described[:, :m])
    with pytest.raises(ValueError, match="`responses` must hold at least"): analysis(responses[:1], described[:1])
    for bad in ({"G": [3]}, {"G": []}):
        with pytest.raises(ValueError, match="`groups`"): analysis(responses, described, groups=bad)


def test_nested_copes_with_repeated_and_constant_columns_and_refuses_many():
    responses, described = rng.random((6, 8)).astype(np.float32), rng.normal(size=(6, 8, 3)).astype(np.float32)
    described[..., 1], described[..., 2] = described[..., 0], 4
    assert np.isfinite(lovm_nested(responses, described).drop(columns="features")).all(axis=None)
    with pytest.raises(ValueError, match="`model_features`"): lovm_nested(responses, np.tile(described, 4))


def test_the_shelf_and_its_truth_are_seeded():
    images = rng.random((60, 64)).astype(np.float32); label = np.arange(60) % 3
    one, two = (encoder_shelf(images, label, seed=1) for _ in range(2))
    first = next(iter(one))
    assert len(one) == 12 and one.keys() == two.keys() and one[first].fingerprint == two[first].fingerprint
    truth = [fine_tune(one[first], images[:30], label[:30], images[30:], label[30:], steps=3) for _ in range(2)]
    assert truth[0].shape == (4,) and np.array_equal(*truth)


@pytest.mark.parametrize("task, times", [("classes", 1), ("noise", 1), ("clusters", 1), ("rotation", 4), ("jigsaw", 6)])
def test_pretexts_keep_the_pixels(task, times):
    images = rng.random((20, 16)).astype(np.float32)
    x, label = pretext(images, np.arange(20) % 3, task)
    assert x.shape == (20 * times, 16) and len(label) == len(x) and label.min() == 0
    assert np.allclose(np.sort(x.reshape(times, 20, 16), axis=2), np.sort(images, axis=1))
    with pytest.raises(ValueError, match="`task`"): pretext(images, np.arange(20) % 3, "colour")
    with pytest.raises(ValueError, match="`size`"): encoder_shelf(images, np.arange(20) % 3, size="huge")
