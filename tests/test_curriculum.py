"""Orders of training examples: folding by its definition, DELT's score by the authors' recurrence, blind controls."""

import numpy as np
import pytest

from selectbench.order.curriculum import (checkpoints, compression_curriculum, curricula, curriculum_study,
                                          curriculum_task, delt, folded, learnability_quality, length_curriculum,
                                          log_bilinear, loss_curriculum, one_epoch)
from selectbench.zoo.lm import batch_rows
from selectbench.zoo.text_task import pool_tokenizer
from selectbench.zoo.tokenizer import pack

RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice("the model of a train loss index shape".split(), 20)) + f" {i}" for i in range(60)]
SMALL = {"n": 20, "config": log_bilinear, "vocab_size": 260, "proxy_tokens": 600, "m": 2, "project": 8, "n_target": 4,
         "n_test": 6, "batch_size": 4, "lr": 3e-2}


@pytest.mark.parametrize("folds", [1, 2, 3, 5, 80])
@pytest.mark.parametrize("n", [1, 2, 12, 61])
def test_folding_deals_the_sorted_list(n, folds):
    score = np.random.default_rng(n).integers(0, 9, n).astype(float)
    ranked = sorted(range(n), key=lambda i: score[i])
    assert folded(score, folds).tolist() == [ranked[i] for f in range(folds) for i in range(n) if i % folds == f]


@pytest.mark.parametrize(("score", "folds", "named"), [([1, np.nan], 2, "score"), ([[1]], 2, "score"),
                                                       ([1, 2], 0, "folds"), ([1, 2], 1.5, "folds"),
                                                       ([1, 2], True, "folds")])
def test_folding_refuses(score, folds, named):
    with pytest.raises(ValueError, match=f"`{named}`"): folded(score, folds)


def recurrence(g, target, norms):
    total, pull = np.zeros(len(g[0])), target[-1].mean(0)
    for t in reversed(range(len(g) - 1)):
        for i in range(len(total)):
            size, pulled = np.linalg.norm(g[t][i]), np.linalg.norm(pull)
            total[i] += pulled * size / norms[i] * (g[t][i] @ pull / (size * pulled))
            norms[i] = size
        pull = pull + target[t].mean(0)
    return total


def test_learnability_and_quality_by_going_back_through_the_checkpoints():
    g, target = RNG.normal(size=(5, 9, 4)), RNG.normal(size=(5, 3, 4)) + 0.5
    last = list(np.linalg.norm(g[-1], axis=1))
    assert np.allclose(learnability_quality(g, target), recurrence(g, target, last))
    assert np.allclose(learnability_quality(g, target, last_norm=1.0), recurrence(g, target, [1.0] * 9))
    with pytest.raises(ValueError, match="`model_gradients`"): learnability_quality(g[:1], target[:1])


def test_what_is_learned_and_helps_scores_highest():
    pull = np.ones(4)
    fades, stays, harms = [pull, pull / 4, pull / 16], [pull] * 3, [-pull] * 3
    score = learnability_quality(np.stack([fades, stays, harms], 1), np.ones((3, 2, 4)))
    assert score[0] > score[1] > 0 > score[2]


def test_delt_keeps_the_best_and_sweeps_from_low_to_high():
    g, target = RNG.normal(size=(3, 12, 4)).astype(np.float32), RNG.normal(size=(3, 2, 4)).astype(np.float32)
    whole, some = delt(g, target, 12, folds=2), delt(g, target, 6, folds=3)
    assert whole.is_ordering and (np.diff(whole.score[whole.index[:6]]) > 0).all()
    assert set(some.index) == set(np.argsort(-some.score)[:6])
    assert (np.diff(some.score[some.index].reshape(3, 2), axis=1) > 0).all()


def test_sorted_reversed_and_tied():
    losses = RNG.gamma(2, size=15).astype(np.float32)
    assert (loss_curriculum(losses).index == np.argsort(losses)).all()
    assert (loss_curriculum(losses, hard_first=True).index == np.argsort(-losses)).all()
    words = ["bb", "a", "aa", "c", "longer"]
    assert [words[i] for i in length_curriculum(words).index] == ["a", "c", "aa", "bb", "longer"]
    assert compression_curriculum(["abcdefgh" * 9, "ab" * 36]).index.tolist() == [1, 0]


def test_an_epoch_reads_no_row_twice():
    tokenizer = pool_tokenizer(TEXTS, 260)
    rows = pack(TEXTS, tokenizer, 32)
    lm = checkpoints(TEXTS, config=log_bilinear, tokens=800, m=2, vocab_size=260)
    assert (lm[1].curve["loss"][: len(lm[0].curve)] == lm[0].curve["loss"]).all()
    per_step = 4 * rows.mask.sum() / len(rows)
    steps = int(np.ceil(one_epoch(TEXTS, tokenizer, block=32, batch_size=4) / per_step))
    assert steps == len(rows) // 4

    class Recipe: batch_size, candidates, shuffle = 4, 1, False
    read = np.concatenate([batch_rows(Recipe, s, len(rows)) for s in range(steps)])
    assert (read == np.arange(steps * 4)).all()


def test_study_of_orders_and_its_control():
    rows = [curricula((1,))[0], *[s for s in curricula((2,)) if s.method == "delt"]]
    table = curriculum_study(TEXTS[:40], TEXTS[40:], rows, controls=rows[:1], schedules=("constant",), seeds=2, **SMALL)
    assert table["order"].tolist() == ["random", "as it comes", rows[0].name, rows[1].name, f"{rows[0].name}, shuffled"]
    assert (table["seeds"] == 2).all() and table["loss"].between(0.5, 6).all()
    task, shuffled = (curriculum_task(TEXTS[:40], TEXTS[40:], shuffled=s, **SMALL) for s in (False, True))
    a, b = task.signal("losses"), shuffled.signal("losses")
    assert not np.array_equal(a, b) and np.array_equal(np.sort(a), np.sort(b))
    assert task.signal("model_gradients").shape == (2, 20, 8)


@pytest.mark.parametrize("change", [{"n_test": 900}, {"n_target": 0}])
def test_task_refuses(change):
    with pytest.raises(ValueError, match="`target_texts`"): curriculum_task(TEXTS[:40], TEXTS[40:], **SMALL | change)
    with pytest.raises(ValueError, match="`target_texts`"): curriculum_task(TEXTS, TEXTS[40:], **SMALL)
