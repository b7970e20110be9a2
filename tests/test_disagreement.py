"""Items on which models disagree: scores against independent forms, and what prediction refuses."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from selectbench.core.vocabulary import sample_signals
from selectbench.evals.disagreement import disco, jensen_shannon, predict_performance, predictive_diversity, signatures

P = np.random.default_rng(1).dirichlet(np.full(4, 0.5), (50, 5))


def test_two_models_give_total_variation_and_scipys_divergence():
    pair = P[:, :2]
    assert np.allclose(predictive_diversity(pair), 1 + abs(pair[:, 0] - pair[:, 1]).sum(1) / 2)
    assert np.allclose(jensen_shannon(pair), jensenshannon(pair[:, 0], pair[:, 1], axis=1) ** 2)


def test_bounds_agreement_and_votes():
    assert np.allclose(predictive_diversity(P[:, :1].repeat(3, axis=1)), 1)
    assert np.allclose(jensen_shannon(P[:, :1].repeat(3, axis=1)), 0)
    certain = np.eye(4)[np.array([[0, 1, 2, 3, 3], [0, 0, 0, 0, 1]])]
    assert predictive_diversity(certain).tolist() == [4, 2]
    assert np.allclose(jensen_shannon(certain)[1], -(0.8 * np.log(0.8) + 0.2 * np.log(0.2)))
    assert (predictive_diversity(P) <= 4).all() and (jensen_shannon(P) <= np.log(5)).all()


@pytest.mark.parametrize("score", ["pds", "jsd"])
def test_a_planted_disagreement_is_chosen_first(score):
    same = np.repeat(P[:, :1], 5, axis=1).astype(np.float32)
    same[17] = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]]
    chosen = disco(same, k=3, score=score)
    assert chosen.index[0] == 17 and chosen.score.argmax() == 17
    with pytest.raises(ValueError, match="`score`"): disco(same, k=3, score="variance")


def test_signatures_and_prediction():
    soft = sample_signals(["soft_predictions"])["soft_predictions"]
    one = signatures(soft, [4, 0])
    assert np.array_equal(one[1], np.r_[soft[4, 1], soft[0, 1]].astype(np.float64))
    score = np.random.default_rng(0).random(len(one))
    assert np.array_equal(predict_performance(one, score, one, components=99, regressor="nearest"), score)
    forest = predict_performance(one, score, one, trees=10)
    assert score.min() <= forest.min() and forest.max() <= score.max()
    assert np.array_equal(forest, predict_performance(one, score, one, trees=10))
    for bad, words in ((dict(performance=score[1:]), "`performance`"), (dict(new=one[:, 1:]), "`new`"),
                       (dict(regressor="svm"), "`regressor`")):
        with pytest.raises(ValueError, match=words):
            predict_performance(**{"known": one, "performance": score, "new": one, **bad})
