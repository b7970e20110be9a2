"""Recall tasks against plain Python, chance, and planted models; the grid repeats itself."""
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selectbench.core.policy import Blocks
from selectbench.nn.blocks import Attention, block_config
from selectbench.ssm.recall import (
    bigram_gaps,
    disjointness_task,
    distinct,
    frequency_accuracy,
    joined,
    mqar,
    mqar_chance,
    mqar_task,
    query_slots,
    recall_accuracy,
    recall_grid,
    set_disjointness,
)

SHAPES = st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(1, 2), st.booleans(), st.integers(0, 99))


class Says(torch.nn.Module):
    "The answers of a table int[n, t], row after row."
    def __init__(self, table, vocab):
        super().__init__()
        self.table, self.vocab, self.weight = table, vocab, torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        rows = (ids[:, None] == self.table[None, :, : ids.shape[1]]).all(2).int().argmax(1)
        return torch.nn.functional.one_hot(self.table[rows, 1: ids.shape[1] + 1], self.vocab).float()


@given(SHAPES)
@settings(max_examples=40, deadline=None)
def test_mqar_is_a_dictionary(shape):
    pairs, more, passes, noise, seed = shape
    blocks = mqar(20, pairs, 2 * pairs * (passes + 1) + 2 * more, 40, seed, passes=passes, noise=noise)
    for row, counts in zip(blocks.tokens.tolist(), blocks.mask, strict=True):
        context, at = row[: 2 * pairs * passes], np.flatnonzero(counts)
        assert context == context[: 2 * pairs] * passes
        known = dict(zip(context[0: 2 * pairs: 2], context[1: 2 * pairs: 2], strict=True))
        assert len(set(known.values())) == pairs and 0 < min(known) <= max(known) < 20 <= min(known.values())
        assert sorted(row[t] for t in at) == sorted(known) and all(known[row[t]] == row[t + 1] for t in at)
        assert at.min() >= 2 * pairs * passes
        if not noise: assert all(row[t] == 0 for t in range(2 * pairs * passes, len(row)) if t not in {*at, *(at + 1)})


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 2), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_sets_share_exactly_the_answer(first, second, passes, seed):
    blocks = set_disjointness(20, first, second, 4 + first + second - 1, seed, passes=passes)
    assert (blocks.mask.sum(1) == 1).all() and blocks.mask[:, -1].all()
    for row in blocks.tokens.tolist():
        one, other = row[1: first + 1], row[first + 2: first + second + 2]
        assert set(one) & set(other) == {row[-1]} and len({*one, *other}) == first + second - 1
        assert row == [1, *one, 2, *other] * passes + [3, row[-1]] and min(one + other) > 3


def test_draws_without_replacement_are_uniform():
    rng = np.random.default_rng(0)
    codes = distinct(rng, 60_000, 3, 3) @ [9, 3, 1]
    seen, counts = np.unique(codes, return_counts=True)
    assert len(seen) == 6 and np.abs(counts / 10_000 - 1).max() < .05
    slots = query_slots(rng, 60_000, 1, 4, .5)[:, 0]
    weight = np.arange(1, 5) ** -.5
    assert np.abs(np.bincount(slots) / 60_000 - weight / weight.sum()).max() < .01


def test_blind_answers_are_at_chance():
    blocks = mqar(20_000, 4, 24, 40)
    row, t = np.nonzero(blocks.mask)
    truth, values = blocks.tokens[row, t + 1], blocks.tokens[:, 1:8:2]
    rank = blocks.mask.cumsum(1)[row, t] - 1
    for said in (values[row, 0], values[row, rank], values[row, 3 - rank]):
        assert abs((said == truth).mean() - 1 / 4) < .01
    assert np.isclose(mqar_chance(4), (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert abs(frequency_accuracy(mqar(2000, 4, 24, 40, 1), blocks) - 1 / 20) < .01
    sets = set_disjointness(20_000, 3, 6, 40)
    for place, m in ((1, 3), (3, 3), (5, 6), (10, 6)):
        assert abs((sets.tokens[:, place] == sets.tokens[:, -1]).mean() - 1 / m) < .015


def test_rows_repeat_by_seed_and_parts_differ():
    for make in (partial(mqar, 50, 3, 16, 40), partial(set_disjointness, 50, 3, 6, 40)):
        assert np.array_equal(make(seed=3).tokens, make(seed=3).tokens)
        assert not {*map(bytes, make(seed=3).tokens)} & {*map(bytes, make(seed=4).tokens)}
    for make in (partial(mqar_task, (2, 3), 12, vocab=40), partial(disjointness_task, ((2, 5), (5, 2)), vocab=40)):
        rows = [{*map(bytes, b.tokens)} for part in ("test", "validation")
                for b in make(rows=40, asked_rows=20, part=part).asked.values()]
        trained = {*map(bytes, make(rows=40, asked_rows=20).train.tokens)}
        assert not set.intersection(*rows) and not any(r & trained for r in rows)


def test_joined_keeps_every_target():
    parts = [mqar(5, 1, 6, 20), set_disjointness(4, 2, 5, 20)]
    whole = joined(parts)
    assert whole.documents.shape == (9, 10) and whole.mask.sum() == sum(p.mask.sum() for p in parts)
    assert np.array_equal(whole.tokens[:5, :6], parts[0].tokens) and not whole.mask[:5, 5:].any()
    targets = np.concatenate([p.tokens[:, 1:][p.mask] for p in parts])
    assert np.array_equal(whole.tokens[:, 1:][whole.mask], targets)


def test_accuracy_of_planted_answers():
    blocks = mqar(30, 3, 16, 40, noise=False)
    table = torch.from_numpy(blocks.tokens).long()
    assert recall_accuracy(Says(table, 40), blocks) == 1
    wrong = table.clone()
    wrong[:10] = torch.where(torch.from_numpy(np.pad(blocks.mask[:10], ((0, 0), (1, 0)))), 0, wrong[:10])
    inputs = Blocks(wrong.numpy(), blocks.documents)
    assert recall_accuracy(Says(wrong, 40), inputs) == 1
    said = Says(wrong, 40)
    said.forward = lambda ids: torch.nn.functional.one_hot(torch.zeros_like(ids), 40).float()
    assert np.isclose(recall_accuracy(said, inputs), 1 / 3)


def test_grid_gives_a_row_a_question_and_repeats(tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "rw")
    make = partial(mqar_task, (1, 2), 8, rows=64, asked_rows=10, vocab=12)
    models = {"a": block_config([Attention], mixer_options={"heads": 1}, width=8, layers=1, mlp=0),
              "b": (block_config([Attention], mixer_options={"heads": 1}, width=8, layers=1, mlp=0), {"lr": 1e-4})}
    one, two = (recall_grid(models, make, 3, (0, 1), lr=1e-2) for _ in range(2))
    assert len(one) == 2 * 2 * 2 and set(one["asked"]) == {1, 2} and (one["state"] == 2 * 8 * 7).all()
    timing = ["cached", "seconds"]
    assert one.drop(columns=timing).equals(two.drop(columns=timing)) and two["cached"].all()
    other = recall_grid(models, make, 3, (0,), part="validation", lr=1e-2)
    assert not other["cached"].any() and np.allclose(one["chance"], np.where(one["asked"] == 1, 1, .75))


def test_gaps_of_repeated_pairs():
    tokens = np.array([[1, 2, 1, 2, 3, 1, 2, 2], [5, 5, 5, 5, 5, 6, 5, 5]], np.int32)
    documents = np.array([[0, 0, 0, 0, 1, 1, 1], [2, -1, 2, 2, 2, 2, 2]], np.int32)
    assert bigram_gaps(Blocks(tokens, documents)).tolist() == [[0, 0, 2, 0, 0, 0, 0], [0, 0, 2, 1, 0, 0, 3]]


@pytest.mark.parametrize("name, call", [
    ("length", lambda: mqar(1, 3, 11)), ("pairs", lambda: mqar(1, 0, 8)),
    ("vocab", lambda: set_disjointness(1, 9, 9, 20)),
    ("first", lambda: set_disjointness(1, 0, 2)), ("part", lambda: disjointness_task(((1, 2),), rows=1, part="train"))])
def test_bad_input_is_named(name, call):
    with pytest.raises(ValueError, match=f"`{name}`"): call()
