"The automata are what a loop in Python makes of them, their groups are groups, and the bounds are counts of all words."
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from selectbench.nn.blocks import block_config, block_lm
from selectbench.nn.dense_scan import DiagonalSSM
from selectbench.ssm.automata import (AUTOMATA, LSTM, Automaton, accuracy_by_length, chance, generated, resets,
                                      state_probabilities, train_on_words, unordered_bound, word_blocks, word_problem)

REFERENCE = np.load(Path(__file__).parent / "data/sd_ssm_reference.npz")
ORDERS = {"parity": 2, "cycle 5": 5, "C2 x C4": 8, "S3": 6, "D4": 8, "A5": 60}


def slow(automaton, word):
    "The states after each symbol, one by one."
    state, states = automaton.start, []
    for symbol in word:
        state = int(automaton.table[state][symbol])
        states.append(state)
    return states


@st.composite
def automata(draw, most_symbols=4):
    "Any automaton, by its table."
    states, symbols = draw(st.integers(1, 6)), draw(st.integers(1, most_symbols))
    cells = st.lists(st.integers(0, states - 1), min_size=states * symbols, max_size=states * symbols)
    return Automaton("any", np.array(draw(cells)).reshape(states, symbols), draw(st.integers(0, states - 1)))


@settings(max_examples=40, deadline=None)
@given(automaton=automata(), seed=st.integers(0, 99))
def test_running_is_a_loop(automaton, seed):
    words = np.random.default_rng(seed).integers(automaton.n_symbols, size=(7, 9))
    assert automaton.run(words).tolist() == [slow(automaton, w) for w in words.tolist()]


@settings(max_examples=40, deadline=None)
@given(automaton=automata(3), length=st.integers(1, 5))
def test_probabilities_and_bounds_count_every_word(automaton, length):
    words = list(itertools.product(range(automaton.n_symbols), repeat=length))
    ends = [slow(automaton, w)[-1] for w in words]
    share = np.bincount(ends, minlength=automaton.n_states) / len(words)
    assert np.allclose(state_probabilities(automaton, length), share)
    assert np.isclose(chance(automaton, length), share.max())
    groups = {}
    for word, end in zip(words, ends, strict=True): groups.setdefault((tuple(sorted(word)), word[-1]), []).append(end)
    best = sum(max(map(g.count, g)) for g in groups.values()) / len(words)
    assert np.isclose(unordered_bound(automaton, length), best)


def test_order_is_worth_nothing_where_symbols_commute():
    for name in ("parity", "cycle 5", "C2 x C4"): assert np.isclose(unordered_bound(AUTOMATA[name], 12), 1)
    for name in ("S3", "D4", "A5"): assert unordered_bound(AUTOMATA[name], 12) < 0.75


@pytest.mark.parametrize("name", ORDERS)
def test_groups(name):
    automaton = AUTOMATA[name]
    assert automaton.n_states == ORDERS[name]
    assert all(sorted(column) == list(range(ORDERS[name])) for column in automaton.table.T.tolist())
    limit = state_probabilities(automaton, 401)
    assert np.allclose(limit[limit > 0], limit.max(), rtol=1e-3)


def test_the_generated_set_is_a_group():
    elements = {tuple(e) for e in generated([(1, 2, 3, 4, 0), (1, 0, 3, 2, 4)]).tolist()}
    times = lambda a, b: tuple(a[i] for i in b)
    assert len(elements) == 60 and {times(a, b) for a in elements for b in elements} == elements
    assert all(any(times(a, b) == (0, 1, 2, 3, 4) for b in elements) for a in elements)
    even = lambda p: sum(p[i] > p[j] for i, j in itertools.combinations(range(5), 2)) % 2 == 0
    assert all(map(even, elements))


def renumbered(ours, theirs):
    "Whether one numbering of states is the other under new names."
    pairs = set(zip(ours.tolist(), theirs.tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize("name, theirs", [("D4", "d4"), ("C2 x C4", "c2_c4"), ("A5", "a5"), ("cycle 5", "cycle_5"),
                                          ("parity", "parity")])
def test_the_authors_tasks(name, theirs):
    words, states = REFERENCE[f"words_{theirs}"], REFERENCE[f"states_{theirs}"]
    assert renumbered(AUTOMATA[name].run(words)[:, -1], states)
    assert not renumbered(AUTOMATA[name].run(words)[:, -2], states)


def test_the_authors_d4_is_not_c2_x_c4():
    assert not renumbered(AUTOMATA["C2 x C4"].run(REFERENCE["words_d4"])[:, -1], REFERENCE["states_d4"])


def test_resets_forget():
    states = resets(3).run([[1, 2, 3, 0, 0], [3, 3, 1, 0, 2]])
    assert states.tolist() == [[0, 1, 2, 2, 2], [2, 2, 0, 0, 1]]


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(list(AUTOMATA)), n=st.integers(1, 20), longest=st.integers(1, 9), seed=st.integers(0, 99))
def test_rows(name, n, longest, seed):
    automaton = AUTOMATA[name]
    blocks = word_blocks(automaton, n, range(1, longest + 1), seed)
    assert blocks.tokens.shape == (n, longest + 1) and (blocks.mask.sum(1) == 1).all()
    assert (blocks.documents[blocks.mask] == np.arange(n)).all()
    for tokens, at in zip(blocks.tokens.tolist(), blocks.mask.argmax(1), strict=True):
        assert tokens[at + 1] == automaton.n_symbols + slow(automaton, tokens[:at + 1])[-1]
        assert set(tokens[at + 2:]) <= {automaton.tokenizer.eot}
    assert np.array_equal(blocks.tokens, word_blocks(automaton, n, range(1, longest + 1), seed).tokens)


def test_lengths_are_drawn_evenly_and_seeds_differ():
    a, b = (word_blocks(AUTOMATA["S3"], 4_000, [2, 5, 9], seed) for seed in (0, 1))
    counts = np.bincount(a.mask.argmax(1) + 1)
    assert set(np.flatnonzero(counts)) == {2, 5, 9} and (abs(counts[[2, 5, 9]] / 4_000 - 1 / 3) < 0.04).all()
    assert not np.array_equal(a.tokens, b.tokens)


class Oracle(nn.Module):
    "Says the state that the automaton is in, or the wrong one after words of more than `until` symbols."
    def __init__(self, automaton, until=10**9):
        super().__init__()
        self.automaton, self.until, self.unused = automaton, until, nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        automaton, k = self.automaton, self.automaton.n_symbols
        states = automaton.run(ids.numpy().clip(max=k - 1))
        late = np.arange(ids.shape[1]) >= self.until
        states = np.where(late, (states + 1) % automaton.n_states, states)
        return nn.functional.one_hot(torch.from_numpy(states + k), automaton.tokenizer.vocab_size).float()


def test_accuracy_by_length():
    automaton = AUTOMATA["A5"]
    table = accuracy_by_length(Oracle(automaton, until=7), automaton, [1, 7, 8, 30], words=20)
    assert table.accuracy.tolist() == [1, 1, 0, 0] and table.length.tolist() == [1, 7, 8, 30]
    assert np.allclose(table.chance, [chance(automaton, t) for t in (1, 7, 8, 30)])


def test_an_untrained_model_is_no_better_than_chance():
    torch.manual_seed(0)
    automaton = AUTOMATA["A5"]
    model = block_lm(automaton.tokenizer.vocab_size, mixer=LSTM, width=16, layers=1)
    assert (accuracy_by_length(model, automaton, [30]).accuracy < 0.1).all()


def test_training_learns_what_commutes(tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path))
    config = block_config(LSTM, mixer_options={"state": 16}, width=16, layers=1, mlp=0)
    run = train_on_words(config, resets(2), 32 * 120, lengths=range(1, 7), batch_size=32, lr=2e-2)
    assert accuracy_by_length(run, resets(2), [4, 6]).accuracy.min() > 0.95


def test_a_diagonal_layer_cannot_beat_its_bound():
    "What its state and the last symbol tell apart, over all words of six symbols, is what the bound counts."
    automaton, words = AUTOMATA["S3"], torch.tensor(list(itertools.product(range(2), repeat=6)))
    torch.manual_seed(0)
    layer = DiagonalSSM(2, state=32)
    with torch.no_grad():
        hidden = nn.functional.one_hot(words, 2).float()
        features = torch.cat([layer(hidden)[:, -1], hidden[:, -1]], 1)
    labels = automaton.run(words)[:, -1]
    groups = {}
    for row, label in zip(features.numpy().round(4).tolist(), labels.tolist(), strict=True):
        groups.setdefault(tuple(row), []).append(label)
    best = sum(max(map(g.count, g)) for g in groups.values()) / len(words)
    assert np.isclose(best, unordered_bound(automaton, 6))


@pytest.mark.parametrize("make, name", [
    (lambda: Automaton("bad", np.array([[0, 2], [1, 0]])), "table"), (lambda: Automaton("bad", np.eye(2)), "table"),
    (lambda: Automaton("bad", np.array([[0], [1]]), start=2), "start"),
    (lambda: word_problem("bad", [(0, 1), (1, 2)]), "generators"),
    (lambda: word_blocks(AUTOMATA["S3"], 3, [0, 1]), "lengths"), (lambda: word_blocks(AUTOMATA["S3"], 0, [1]), "n"),
    (lambda: LSTM(8)(torch.full((1, 2, 8), np.nan)), "hidden")])
def test_bad_input(make, name):
    with pytest.raises(ValueError, match=f"`{name}`"): make()
