"""SelectIT and RDS+ against what their authors' programs gave, and what the signals may not be."""
from pathlib import Path

import numpy as np
import pytest

from selectbench.data.judge import rds_plus, rds_plus_tasks, selectit

# The authors' programs, run on these random signals: self_reflection/{token,sentence,model}_level.py of
# Blue-Raincoat/SelectIT (481325094c27) with a model that gives the logits, alpha 0.2, and minimal_multitask/
# get_top_influences.py and get_top_aggregated_influences.py (--selection_method max) of
# hamishivi/automated-instruction-selection (df71a044d567), given the cosines.
REFERENCE = dict(np.load(Path(__file__).parent / "data" / "judge_reference.npz"))
L = REFERENCE["selectit_rating_logits"]
WEIGHTS = np.array([7 / 20, 13 / 20, 70 / 90], np.float32)  # of the program: they add up to 1.78
ONE = np.ones(1, np.float32)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("signals, name, scale", [
    ((L[:1, :, :1], ONE), "selectit_token_level_score", 1),
    ((L[:1], ONE), "selectit_sentence_level_score", 1),
    ((L, WEIGHTS), "selectit_score", 16 / 9),
])
def test_selectit_gives_the_scores_and_the_order_of_the_authors_programs(signals, name, scale):
    s = selectit(*signals, L.shape[1], normalise="softmax")
    np.testing.assert_allclose(s.score * scale, REFERENCE[name], rtol=1e-5)
    assert s.index.tolist() == REFERENCE[f"{name}_order"].tolist()


def test_the_paper_s_shares_are_another_score_that_ranks_alike():
    from scipy.stats import spearmanr
    paper, program = (selectit(L, WEIGHTS, 5, normalise=n).score for n in ("share", "softmax"))
    assert not np.allclose(paper, program, rtol=0.1) and 0.8 < spearmanr(paper, program)[0] < 1


@pytest.mark.parametrize("k", [1, 7, 25, 60])
def test_rds_takes_what_the_authors_programs_take(k):
    E, T, g = (REFERENCE[f"rds_{n}"] for n in ("embeddings", "target_embeddings", "target_groups"))
    assert rds_plus(E, T, k).index.tolist() == REFERENCE[f"rds_single_{k}"].tolist()
    assert rds_plus_tasks(E, T, g, k).index.tolist() == REFERENCE[f"rds_tasks_{k}"].tolist()


def test_certainty_and_agreement_raise_a_score():
    sure, unsure, split = [0, 0, 0, 0, 5.0], [0, 0, 0, 0, 1.0], [5.0, 0, 0, 0, 0]
    asked = np.array([[sure, sure], [unsure, unsure], [sure, split], [sure, sure]], np.float32)[None]
    s = selectit(asked, ONE, 4)
    assert s.index.tolist()[:2] == [0, 3] and s.score[0] == s.score[3] > max(s.score[1:3])
    shifted = selectit(asked + np.float32(100), ONE, 4)  # logits are known up to a constant
    np.testing.assert_allclose(shifted.score, s.score, rtol=1e-4)
    flat = selectit(np.zeros((2, 5, 3, 5), np.float32), np.ones(2, np.float32), 3)
    assert flat.index.tolist() == [0, 1, 2] and (flat.score == 0).all()


def test_alpha_matters_only_where_prompts_disagree():
    agree = np.repeat(L[:1, :, :1], 3, axis=2)
    scores = [selectit(agree, ONE, 5, alpha=a).score for a in (0, 5)]
    np.testing.assert_allclose(*scores, atol=1e-12)
    assert (selectit(L, WEIGHTS, 5, alpha=1).score < selectit(L, WEIGHTS, 5, alpha=0).score).all()


def test_a_larger_model_counts_for_more_and_the_unit_for_nothing():
    near = lambda w: np.abs(selectit(L[:2], np.array(w, np.float32), 5).score - selectit(L[:1], ONE, 5).score).sum()
    assert near([9, 1]) < near([1, 1]) < near([1, 9])
    np.testing.assert_allclose(selectit(L, WEIGHTS, 5).score, selectit(L, WEIGHTS * 1e9, 5).score, rtol=1e-6)


def test_a_target_of_one_query_is_its_nearest_and_texts_of_the_target_come_first():
    E, T = RNG.normal(size=(50, 6)), RNG.normal(size=(8, 6))
    cosine = (E @ T[0]) / np.linalg.norm(E, axis=1)
    assert rds_plus(E, T[:1], 9).index.tolist() == np.argsort(-cosine)[:9].tolist()
    E[10:18] = T * RNG.uniform(0.1, 9, (8, 1))  # lengths do not count
    s = rds_plus(E, T, 12)
    assert s.index[:8].tolist() == list(range(10, 18)) and s.info["query"][:8].tolist() == list(range(8))
    assert rds_plus(E, T, 5).index.tolist() == s.index[:5].tolist()
    twice = rds_plus(np.repeat(E[:5], 2, axis=0), T, 10).index  # of equal texts the earlier
    assert all(twice.tolist().index(2 * i) < twice.tolist().index(2 * i + 1) for i in range(5))


def test_no_direction_is_far_from_everything_and_is_no_error():
    E = RNG.normal(size=(6, 3)); E[2] = 0
    assert sorted(rds_plus(E, E[:1], 6).index.tolist()) == list(range(6))
    assert np.isfinite(rds_plus(E, np.zeros((2, 3)), 6).score).all()


def test_signals_are_not_changed():
    E, T = RNG.normal(size=(9, 3)), RNG.normal(size=(2, 3))
    before = E.copy(), T.copy()
    rds_plus(E, T, 3), rds_plus_tasks(E, T, np.array([0, 1]), 3)
    assert np.array_equal(E, before[0]) and np.array_equal(T, before[1])


E, T, G = RNG.normal(size=(9, 3)), RNG.normal(size=(2, 3)), np.array([0, 1])


@pytest.mark.parametrize("name, call", {
    "rating_logits": lambda: selectit(L[..., :1], WEIGHTS, 3),
    "rating_logits ": lambda: selectit(np.where(L > 3, np.nan, L), WEIGHTS, 3),
    "model_sizes": lambda: selectit(L, WEIGHTS[:2], 3),
    "model_sizes ": lambda: selectit(L, WEIGHTS * 0, 3),
    "alpha": lambda: selectit(L, WEIGHTS, 3, alpha=-1),
    "normalise": lambda: selectit(L, WEIGHTS, 3, normalise="max"),
    "k": lambda: selectit(L, WEIGHTS, 41),
    "target_embeddings": lambda: rds_plus(E, T[:0], 3),
    "target_embeddings ": lambda: rds_plus_tasks(E, T[:0], G[:0], 3),
    "target_embeddings  ": lambda: rds_plus(E, T[:, :2], 3),
    "target_groups": lambda: rds_plus_tasks(E, T, G[:1], 3),
    "embeddings": lambda: rds_plus(np.where(E > 1, np.inf, E), T, 3),
}.items())
def test_a_bad_argument_is_named(name, call):
    with pytest.raises(ValueError, match=f"`{name.strip()}`"): call()
