"DSIR against the authors' program (tests/data/dsir_reference.json), ZIP-FIT against gzip itself, and bad input."
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import sem
from scipy.stats import t as student

from selectbench.core.selection import gumbel_top_k
from selectbench.data.importance import (
    HashedNgrams,
    color_filter,
    dsir,
    kl_reduction,
    log_importance,
    log_ratio,
    zip_fit,
)

reference = json.loads((Path(__file__).parent / "data" / "dsir_reference.json").read_text(encoding="utf-8"))
pool, target = reference["pool"], reference["target"]
letters = ["a b c", "b c d e", "c d"]


@pytest.mark.parametrize("run", reference["runs"], ids=lambda r: f"n={r['ngrams']}-smoothing={r['smoothing']}")
def test_log_weights_are_those_of_the_authors_program(run):
    options = {"ngrams": run["ngrams"], "buckets": run["buckets"], "hashing": "sha256"}
    ours = dsir(pool, target, 3, smoothing=run["smoothing"], **options).info["log_weight"]
    assert np.abs(ours - run["log_weight"]).max() < 1e-9
    streamed = log_importance([pool[:40], [], pool[40:]], target, features=HashedNgrams(**options),
                              smoothing=run["smoothing"])
    assert np.array_equal(streamed, ours)


def test_lengths_are_those_of_the_authors_program():
    run = reference["runs"][0]
    assert HashedNgrams(run["ngrams"]).sums(pool, np.zeros(10_000))[1].tolist() == run["tokens"]


def test_the_block_size_does_not_matter(monkeypatch):
    from selectbench.data import importance
    runs = importance._runs
    whole = HashedNgrams(hashing="sha256").sums(pool, np.arange(10_000.))
    monkeypatch.setattr(importance, "_runs", lambda texts: runs(texts, 500))
    for a, b in zip(whole, HashedNgrams(hashing="sha256").sums(pool, np.arange(10_000.)), strict=True):
        assert np.array_equal(a, b)
    assert (HashedNgrams()(pool).sum(axis=0) == HashedNgrams().counts(pool)).all()


def _hash_gap(fast="fast", scale=1):
    "KL reduction by `fast` less that by sha256, one a number of buckets, and the mean of the latter; 20 draws of each."
    judge = HashedNgrams(2, 9973, "sha256")  # the buckets of neither: a judge that shares them favours what they chose
    bags, goal = judge(pool), judge.counts(target)
    total = lambda rows: np.asarray(bags[rows].sum(0)).ravel()
    raw = total(np.arange(len(pool)))
    def reach(buckets, hashing):
        weight = log_importance([pool], target, features=HashedNgrams(2, buckets, hashing))
        return np.mean([kl_reduction(goal, raw, total(gumbel_top_k(weight, 20, s)[0])) for s in range(20)])
    found = np.array([[reach(b // scale, fast), reach(b, "sha256")] for b in range(8000, 12000, 200)])
    return found[:, 0] - found[:, 1], abs(found[:, 1].mean())


def _as_good(gap, size): return abs(gap.mean()) < student.ppf(.975, len(gap) - 1) * sem(gap) + 0.01 * size


def test_the_fast_hash_selects_as_well():
    "The difference of the hashes is within its 95 % interval over numbers of buckets, and 1 %."
    assert _as_good(*_hash_gap())


def test_a_worse_hash_would_be_seen(): assert not _as_good(*_hash_gap(scale=100))


@pytest.mark.parametrize("level", [1, 2, 3, 4, 6, 9])
def test_zip_fit_is_the_double_loop_over_gzip(level):
    size = lambda text: len(gzip.compress(text.encode(), level))
    def alignment(x):
        ncd = [(size(x + q) - min(size(x), size(q))) / max(size(x), size(q)) for q in target[:5]]
        return 1 - np.mean(ncd)
    ours = zip_fit(pool, target[:5], 4, level=level)
    assert np.abs(ours.score - [alignment(x) for x in pool]).max() < 1e-12


def test_targets_in_the_pool_come_first_for_zip_fit_and_are_ordinary_texts_for_dsir():
    mixed = [*pool[:20], *target[:3]]
    assert zip_fit(mixed, target[:1], 1).index.tolist() == [20]
    picked = dsir(mixed, target[:3], 3, seed=0)
    assert picked.k == 3 and np.isfinite(picked.info["log_weight"]).all()


def test_empty_texts_are_taken_last_by_dsir_and_have_a_length_for_zip_fit():
    texts = ["", *letters, " \n"]
    for seed in range(5):
        picked = dsir(texts, ["c d"], 5, seed=seed)
        assert sorted(picked.index[:3].tolist()) == [1, 2, 3] and picked.index[3:].tolist() == [0, 4]
        assert np.isnan(picked.score[[0, 4]]).all()
    assert np.isfinite(zip_fit(texts, ["c d"], 2).score).all()


def test_shorter_than_min_tokens_are_taken_last():
    assert dsir(letters, ["c d"], 2, min_tokens=3).index.tolist() != [2]
    assert dsir(letters, ["c d"], 3, min_tokens=3).index[2] == 2


@pytest.mark.parametrize("bad", [[], [""], ["  \n", ""]])
def test_a_target_without_text_is_refused(bad):
    with pytest.raises(ValueError, match="`target_texts`"): dsir(letters, bad, 1)
    with pytest.raises(ValueError, match="`target`"): log_importance([letters], bad)
    with pytest.raises(ValueError, match="`target_texts`"): zip_fit(letters, bad[:0], 1)


def test_a_pool_without_text_is_refused():
    with pytest.raises(ValueError, match="`texts`"): dsir(["", " "], letters, 1)
    with pytest.raises(ValueError, match="`raw`"): log_importance([[""], []], letters)
    with pytest.raises(ValueError, match="`raw`"): log_importance([], letters)
    with pytest.raises(ValueError, match="`raw`"): log_ratio(np.array([1, 0]), np.array([0, 0]))


def test_equal_weights_are_drawn_evenly_and_equal_scores_in_order():
    same = ["a b"] * 6
    drawn = np.concatenate([dsir(same, ["a c"], 2, seed=s).index for s in range(600)])
    assert np.abs(np.bincount(drawn, minlength=6) - 200).max() < 5 * np.sqrt(200)
    assert zip_fit(same, ["a c"], 3).index.tolist() == [0, 1, 2]
    assert color_filter(np.ones(4, np.float32), np.ones(4, np.float32), 2).index.tolist() == [0, 1]


@pytest.mark.parametrize(("name", "options"), [("ngrams", {"ngrams": 0}), ("buckets", {"buckets": 0}),
                                               ("buckets", {"buckets": 2**31}), ("hashing", {"hashing": "md5"})])
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=f"`{name}`"): dsir(letters, letters, 1, **options)


@pytest.mark.parametrize("level", [0, 10, -1, 2.5])
def test_compression_levels_out_of_range_are_refused(level):
    with pytest.raises(ValueError, match="`level`"): zip_fit(letters, letters, 1, level=level)


def test_shards_that_can_be_read_once_only_are_refused():
    with pytest.raises(ValueError, match="`shards`"): log_importance((part for part in [letters]), letters)


def test_huge_and_impossible_weights_can_be_drawn_from():
    index, key = gumbel_top_k(np.array([-np.inf, 1e6, -1e6, 1e6 + 100]), 3, seed=0)
    assert index.tolist() == [3, 1, 2] and key[0] == -np.inf
