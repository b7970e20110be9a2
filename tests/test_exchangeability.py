"Contamination tests: uniform p values by enumeration, the chain rule, closed forms, power, bad input."
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from selectbench.evals.exchangeability import (
    contamination,
    contamination_test,
    permutation_p_value,
    sequence_log_probs,
    shard_orders,
    sharded_test,
    strided_windows,
)
from selectbench.zoo.lm import train_lm
from selectbench.zoo.text_task import tiny_llama
from selectbench.zoo.tokenizer import ByteTokenizer

ITEMS = ["one", "three", "a fifth", "on the seventh day", "x", "yes or no"]


class Context(torch.nn.Module):
    "Logits that depend on the last four tokens and on how far back each is; nothing is trained."
    def __init__(self, reach=4, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.tables = torch.nn.Parameter(torch.randn(reach, 257, 257, generator=draw))

    def forward(self, ids):
        out = torch.zeros(*ids.shape, 257)
        for back, table in enumerate(self.tables):
            if back < ids.shape[1]: out[:, back:] = out[:, back:] + table[ids[:, : ids.shape[1] - back]]
        return out


def fake(block=16, reach=4):
    "What `sequence_log_probs` asks of a model, around a `Context`."
    module = Context(reach)
    return SimpleNamespace(model=lambda device: module, tokenizer=ByteTokenizer(), block=block)


def chain_rule(model, items, order, stride):
    "Token by token, each after as many tokens as its window shows."
    ids, module, total = [256, *"".join(items[i] for i in order).encode()], model.model("cpu"), 0.0
    for t in range(1, len(ids)):
        begin = 0 if t <= model.block else -(-(t - model.block) // stride) * stride
        with torch.no_grad(): logits = module(torch.tensor([ids[begin:t]]))[0, -1]
        total += torch.log_softmax(logits, -1)[ids[t]].item()
    return total


@pytest.mark.parametrize(("block", "stride"), [(64, None), (16, 5), (16, 16), (3, 1), (7, 4), (1, 1)])
def test_log_probs_follow_the_chain_rule(block, stride):
    model, orders = fake(block), [[0, 1, 2, 3, 4, 5], [5, 3, 1], [4], [5, 3, 1], [3, 3]]
    found = sequence_log_probs(model, ITEMS, orders, stride=stride)
    expected = [chain_rule(model, ITEMS, o, stride or block // 2) for o in orders]
    assert np.allclose(found, expected, rtol=1e-5) and found[1] == found[3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 12), st.data())
def test_every_target_counts_once(lengths, block, data):
    "And, after the first window, behind at least block - stride tokens."
    stride, lengths = data.draw(st.integers(1, block)), np.array(lengths)
    sequences = np.tile(np.arange(1 + lengths.max()), (len(lengths), 1))
    blocks = strided_windows(sequences, lengths, block=block, stride=stride)
    for i, length in enumerate(lengths):
        counted = blocks.tokens[:, 1:][blocks.documents == i]
        assert sorted(counted) == list(range(1, length + 1))
    row, column = np.nonzero(blocks.mask)
    behind = np.where(blocks.tokens[row, 0] == 0, block, column)
    assert (behind >= block - stride).all()


def test_p_is_uniform_over_all_orders():
    "Each of the 24 orders of four items as the canonical one, all others as the shuffles."
    found = sequence_log_probs(fake(), ITEMS[:4], np.array(list(permutations(range(4)))))
    p = permutation_p_value(found, np.stack([np.delete(found, i) for i in range(24)]))
    assert np.allclose(np.sort(p), np.arange(1, 25) / 24)


def test_ties_count_against_contamination():
    assert permutation_p_value(0.0, np.zeros(9)) == 1
    assert permutation_p_value(0.0, -np.ones(9)) == 0.1


def test_sharded_test_is_students():
    rng = np.random.default_rng(0)
    canonical, shuffled = rng.normal(size=9), rng.normal(size=(9, 5))
    d = canonical - shuffled.mean(1)
    found = sharded_test(canonical, shuffled)
    t = d.mean() / d.std(ddof=1) * 3
    assert np.allclose(found, (d.mean(), t, stats.t.sf(t, 8)))
    against = sharded_test(-canonical, -shuffled)
    both = sharded_test(np.stack([canonical, -canonical]), np.stack([shuffled, -shuffled]))
    assert np.allclose(np.transpose(both), [found, against])
    assert np.isclose(found.p_value + against.p_value, 1)


def clean_sets(effect=0.0, sets=200, shards=8, m=19, seed=0):
    "p values [sets, 2] of both tests on simulated log-probabilities."
    x = np.random.default_rng(seed).normal(size=(sets, shards, 1 + m))
    x[..., 0] += effect
    total = x.sum(1)
    return np.stack([sharded_test(x[..., 0], x[..., 1:]).p_value, permutation_p_value(total[:, 0], total[:, 1:])], 1)


def test_level_and_power():
    "p values of 200 clean sets are uniform; a planted effect is found, more often the larger it is."
    clean = clean_sets()
    assert stats.kstest(clean[:, 0], "uniform").pvalue > 0.01
    assert (clean[:, 1] * 20 % 1 < 1e-9).all() or np.allclose(clean[:, 1] * 20, np.round(clean[:, 1] * 20))
    power = np.array([(clean_sets(e) <= 0.05).mean(0) for e in (0, 0.5, 1, 2)])
    assert (power[0] < 0.09).all() and (np.diff(power, axis=0) > 0.05).all() and (power[-1] > 0.9).all()


def test_level_with_a_model():
    "200 sets in random orders under a model that cares for order: rejected as often as the level says."
    model, rng = fake(64), np.random.default_rng(0)
    words = ["".join(w) + " " for w in permutations("abcd", 3)]
    rows = [contamination_test(model, rng.permutation(words)[:12].tolist(), shards=4, permutations=19, seed=i)
            for i in range(200)]
    p = np.array([row.permutation_p_value.item() for row in rows])
    assert 0.01 < (p <= 0.05).mean() < 0.1 and 0.42 < p.mean() < 0.6


def test_shards():
    parts = shard_orders(11, 4, 6, seed=1)
    assert [p.shape for p in parts] == [(7, 3), (7, 3), (7, 3), (7, 2)]
    assert np.array_equal(np.concatenate([p[0] for p in parts]), np.arange(11))
    for part in parts: assert (np.sort(part, 1) == part[0]).all()
    assert all(np.array_equal(a, b) for a, b in zip(parts, shard_orders(11, 4, 6, seed=1), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, shard_orders(11, 4, 6, seed=2), strict=True))


def test_a_memorised_order_is_found():
    "A model that has read one order, and nothing else, prefers it to others; the turned order is not preferred."
    items = [f"{w}\n" for w in "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()]
    lm = train_lm(tiny_llama(32, 1), ["".join(items)] * 16, 30_000, block=32, batch_size=8, lr=1e-2)
    row = contamination_test(lm, items, shards=4, permutations=19)
    assert list(row) == ["gap", "statistic", "p_value", "permutation_p_value", "shards", "permutations"]
    assert row.gap.item() > 1 and row.p_value.item() < 0.05 and row.permutation_p_value.item() == 0.05
    turned = contamination_test(lm, items[::-1], shards=4, permutations=19)
    assert turned.gap.item() < 0 and turned.permutation_p_value.item() > 0.5
    assert row.equals(contamination_test(lm, items, shards=4, permutations=19))


@pytest.mark.parametrize(("call", "name"), [
    (lambda: permutation_p_value(np.nan, [1.0]), "canonical"),
    (lambda: permutation_p_value(0.0, [1.0, np.nan]), "shuffled"),
    (lambda: permutation_p_value(0.0, []), "shuffled"),
    (lambda: permutation_p_value([0.0, 1.0], [[1.0]]), "shuffled"),
    (lambda: sharded_test([0.0], [[1.0]]), "canonical"),
    (lambda: sharded_test([1.0, 1.0], [[0.0], [0.0]]), "canonical"),
    (lambda: sequence_log_probs(fake(), "text", [[0]]), "items"),
    (lambda: sequence_log_probs(fake(), ["a", ""], [[0, 1]]), "items"),
    (lambda: sequence_log_probs(fake(), ["a", "b"], [[0, 2]]), "orders"),
    (lambda: sequence_log_probs(fake(), ["a", "b"], [[-1, 1]]), "orders"),
    (lambda: sequence_log_probs(fake(), ["a", "b"], [[0.0, 1.0]]), "orders"),
    (lambda: sequence_log_probs(fake(), ["a", "b"], []), "orders"),
    (lambda: sequence_log_probs(fake(), ["a", "b"], [[0]], stride=17), "stride"),
    (lambda: sequence_log_probs(fake(), ["a", "b"], [[0]], stride=0), "stride"),
    (lambda: contamination_test(fake(), ITEMS, shards=1, permutations=2), "shards"),
    (lambda: contamination_test(fake(), ITEMS, shards=4, permutations=2), "shards"),
    (lambda: contamination_test(fake(), ITEMS, shards=2, permutations=0), "permutations"),
])
def test_bad_input(call, name):
    with pytest.raises(ValueError, match=f"`{name}`"): call()


def test_analysis_reads_the_numbers_alone():
    found = np.random.default_rng(0).normal(size=(5, 8))
    row = contamination(found).iloc[0]
    assert row[["gap", "p_value"]].tolist() == [sharded_test(found[:, 0], found[:, 1:])[i] for i in (0, 2)]
    rank = 1 + (found[:, 1:].sum(0) >= found[:, 0].sum()).sum()
    assert row.permutation_p_value == rank / 8 and row.shards == 5 and row.permutations == 7
    for bad in (found[:1], found[:, :1]):
        with pytest.raises(ValueError, match="`shard_log_probs`"): contamination(bad)
