"Leaderboards under changes of format: prompts by hand, brute force, planted models, the nulls' level, a hub model."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from selectbench.evals.exchangeability import contamination_test, sequence_log_probs
from selectbench.evals.sensitivity import (
    Format,
    Questions,
    arrangement,
    correct,
    delimiter_brittleness,
    every_order,
    format_scores,
    kendall_tau,
    leaderboard_sensitivity,
    option_scores,
    ranks,
    rendered,
    seed_agreement,
    solved,
    training_rows,
    word_facts,
)
from selectbench.zoo.tokenizer import ByteTokenizer

TWO = Questions(["Which?", "Who?"], [["red", "blue", "green", "grey"], ["you", "me", "them", "us"]], [2, 0])


class Unigram(torch.nn.Module):
    "The same logits everywhere: prefers one symbol wherever it stands, and knows texts by their letters alone."
    def __init__(self, best="A", seed=0):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(257, generator=torch.Generator().manual_seed(seed)))
        with torch.no_grad(): self.table[ord(best)] = 9.0

    def forward(self, ids): return self.table.expand(*ids.shape, 257)


class Context(torch.nn.Module):
    "Logits that depend on the last four tokens and on how far back each is."
    def __init__(self, seed=0):
        super().__init__()
        self.tables = torch.nn.Parameter(torch.randn(4, 257, 257, generator=torch.Generator().manual_seed(seed)))

    def forward(self, ids):
        out = torch.zeros(*ids.shape, 257)
        for back, table in enumerate(self.tables): out[:, back:] = out[:, back:] + table[ids[:, : ids.shape[1] - back]]
        return out


def fake(module, block=512): return SimpleNamespace(model=lambda device: module, tokenizer=ByteTokenizer(), block=block)


def many(n=400, seed=0):
    "Questions whose right option is at each place a quarter of the time; texts are random letters."
    rng = np.random.default_rng(seed)
    texts = ["".join(chr(97 + c) for c in row) for row in rng.integers(26, size=(4 * n, 5))]
    return Questions(["?"] * n, np.reshape(texts, (n, 4)).tolist(), rng.permutation(np.arange(n) % 4))


def test_prompts_by_hand():
    listed = "Question: Which?\nChoices:\nA. red\nB. blue\nC. green\nD. grey\nAnswer:"
    prompts, answers = rendered(TWO, Format())
    assert prompts[0] == listed and answers == [[" A", " B", " C", " D"]] * 2
    prompts, answers = rendered(TWO, Format(scoring="hybrid"))
    assert prompts[0] == listed and answers[1] == [" you", " me", " them", " us"]
    assert rendered(TWO, Format(scoring="cloze")) == (["Question: Which?\nAnswer:", "Question: Who?\nAnswer:"], answers)
    prompts, answers = rendered(TWO, Format("$&#@", order=1))  # green and blue, you and me change places
    assert prompts[0] == "Question: Which?\nChoices:\n$. red\n&. green\n#. blue\n@. grey\nAnswer:"
    assert prompts[1] == "Question: Who?\nChoices:\n$. me\n&. you\n#. them\n@. us\nAnswer:"
    assert answers == [[" $", " #", " &", " @"], [" &", " $", " #", " @"]]
    assert solved(TWO, Format(order=1))[0].endswith("Answer: B")
    stems = Questions(TWO.questions, TWO.options, TWO.gold, ["Say:", "Tell:"])
    assert rendered(stems, Format(scoring="cloze"))[0] == ["Question: Which?\nSay:", "Question: Who?\nTell:"]


def test_arrangements():
    items = many(50)
    for order in ("random", "lines"):
        stands, symbols = arrangement(items, Format(order=order, seed=3))
        assert (np.sort(stands) == np.arange(4)).all() and len(np.unique(stands, axis=0)) > 10
        assert (symbols == (stands if order == "lines" else np.arange(4))).all()
    prompts, answers = rendered(items, Format(order="lines", seed=3))
    assert answers == [[" A", " B", " C", " D"]] * 50
    assert all(f"B. {o[1]}\n" in p for p, o in zip(prompts, items.options, strict=True))
    for place in range(4):
        stands, _ = arrangement(items, Format(order=place))
        assert (stands[:, place] == items.gold).all() and ((stands != np.arange(4)).sum(1) <= 2).all()


@pytest.mark.parametrize("form", [Format(), Format(scoring="cloze"), Format("1234", "random", "hybrid", "#", 5)])
def test_scores_are_those_of_one_option_at_a_time(form):
    model, items = fake(Context()), many(6)
    for demonstrations in (None, TWO):
        found = option_scores(model, items, form, demonstrations, batch_size=5)
        head = "" if demonstrations is None else "".join(t + form.delimiter for t in solved(TWO, form))
        for i, (prompt, answers) in enumerate(zip(*rendered(items, form), strict=True)):
            for o, answer in enumerate(answers):
                ids, total = [256, *(head + prompt).encode()], 0.0
                for token in answer.encode():
                    with torch.no_grad(): logits = model.model("cpu")(torch.tensor([ids]))[0, -1]
                    total += torch.log_softmax(logits, -1)[token].item()
                    ids.append(token)
                length = 1 if form.scoring == "symbol" else len(items.options[i][o])
                assert abs(found[i, o] - total / length) < 1e-4


def test_planted_models():
    "Who always takes the first: 1 with gold first, 0 elsewhere, its share at random. Who reads content: no change."
    items, first = many(100), [fake(Unigram())]
    forms = [Format(order=o) for o in ("given", 0, 1, 2, 3, "random")]
    accuracy = correct(format_scores(first, items, forms), items.gold).mean((1, 2))
    stands, _ = arrangement(items, forms[-1])
    assert accuracy[:5].tolist() == [0.25, 1, 0, 0, 0] and accuracy[5] == (stands[:, 0] == items.gold).mean()
    assert abs(accuracy[5] - 0.25) < 3 * np.sqrt(0.25 * 0.75 / 100)
    last = [fake(Unigram(best="D"))]
    board = format_scores(first + last, items, [forms[0], forms[1], forms[4]])
    assert leaderboard_sensitivity(board, items.gold).rank_shift.tolist() == [0, 0.5, 0.5]
    blind = [fake(Unigram(seed=s)) for s in range(3)]
    forms = [Format(scoring="hybrid")] + [Format(scoring="hybrid", order=o) for o in (0, 3, "random", "lines")]
    forms += [Format("1234", scoring="hybrid"), Format(scoring="hybrid", delimiter="#")]
    items = many(40)
    board = format_scores(blind, items, forms, TWO)
    assert (board == board[:, :, :1]).all()
    found = leaderboard_sensitivity(board, items.gold, draws=49)
    assert (found.tau == 1).all() and not found[["change", "absolute_change", "rank_shift"]].to_numpy().any()
    assert (found[["tau_p", "change_p"]] == 1).all(axis=None)
    spread = delimiter_brittleness(board, items.gold, draws=49)
    assert not spread.range.any() and (spread.range_p == 1).all() and sorted(spread.leads) == [0, 0, 7]


def test_a_delimiter_reaches_the_model_only_with_demonstrations():
    model, items = [fake(Context())], many(8)
    forms = [Format(scoring="cloze", delimiter=d) for d in ("\n\n", "#")]
    without = format_scores(model, items, forms)
    assert (without[:, :, 0] == without[:, :, 1]).all()


def test_tau_and_ranks_are_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.integers(5, size=(2, 40, 6)) / 4
    assert np.allclose(kendall_tau(a, b), [stats.kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)])
    assert ranks(np.array([0.5, 0.9, 0.5])).tolist() == [2.5, 1, 2.5]
    assert np.isnan(kendall_tau(np.ones(3), np.arange(3.0)))


def test_ties_share_the_point():
    scores = np.array([[[[1.0, 1, 0, 1]], [[0, 2, 1, 1]]]])
    assert correct(scores, np.array([0, 1])).tolist() == [[[1 / 3], [1.0]]]
    assert correct(scores, np.array([2, 2])).tolist() == [[[0.0], [0.0]]]


def board(rng, accuracy, n=60):
    "Scores [m, n, j, 2] of models that are right with probability `accuracy`[m, j], and y = 0."
    right = rng.random((len(accuracy), n, len(accuracy[0]))) < np.asarray(accuracy)[:, None]
    return np.stack([right, ~right], -1).astype(np.float32), np.zeros(n, dtype=np.int64)


def test_level_and_power():
    "100 leaderboards on which format means nothing are rejected at most as often as the level says; others are not."
    rng, skill = np.random.default_rng(0), np.linspace(0.4, 0.8, 5)
    null, far = [], []
    for _ in range(100):
        scores, y = board(rng, np.stack([skill, skill], 1))
        null.append(leaderboard_sensitivity(scores, y, draws=99).loc[1, ["tau_p", "change_p"]].to_numpy(float))
        far.append(delimiter_brittleness(scores, y, draws=99).range_p[0])
    share = np.c_[np.array(null), far] <= 0.05
    assert (share.mean(0) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)).all() and (np.array(null).mean(0) > 0.42).all()
    scores, y = board(rng, np.stack([skill, skill[::-1]], 1), 300)
    row = leaderboard_sensitivity(scores, y).loc[1]
    assert row.tau_p <= 0.05 and row.change_p == 0.001 and row.tau < 0 and row.rank_shift == 4 and row.items_tau > 0.7
    assert (delimiter_brittleness(scores, y).range_p[[0, 4]] == 0.001).all()


def test_any_model_can_lead():
    scores, y = board(np.random.default_rng(1), 0.3 + 0.6 * np.eye(3), 200)
    found = delimiter_brittleness(scores, y)
    assert found.leads.tolist() == [1, 1, 1] and found.best.tolist() == [0, 1, 2] and (found.range > 0.4).all()
    assert np.allclose(found.range, found.high - found.low)


def test_rows_for_training():
    "Two rows of three questions, in one of two formats each; what counts are the right answers."
    items, tokenizer = many(7), ByteTokenizer()
    forms = [Format(), Format(scoring="cloze", delimiter="|")]
    rows = training_rows(items, forms, tokenizer, shots=3, seed=1)
    assert len(rows) == 2
    parts = [items.take(np.arange(s, s + 3)) for s in (0, 3)]
    possible = {}
    for part in parts:
        for form in forms:
            answers = rendered(part, form)[1]
            said = "".join(a[g] for a, g in zip(answers, part.gold, strict=True))
            possible[form.delimiter.join(solved(part, form))] = said
    for row in range(2):
        assert possible[tokenizer.decode(rows.tokens[row])] == tokenizer.decode(rows.tokens[row, 1:][rows.mask[row]])


def test_formats_are_drawn_apart_from_questions():
    "Questions that were drawn from the same seed as the formats meet each of them."
    drawn = np.random.default_rng(3).integers(4, size=400)
    items = Questions([f"q{d}" for d in drawn], [["red", "blue"]] * 400, [0] * 400)
    forms = [Format("AB"), Format("12"), Format("ab"), Format("AB", scoring="cloze")]
    rows, tokenizer = training_rows(items, forms, ByteTokenizer(), shots=1, seed=3), ByteTokenizer()
    texts = [tokenizer.decode(row) for row in rows.tokens]
    assert len({(t.split()[1], t.split()[3]) for t in texts}) == 16


def test_words_that_a_group_uses_beyond_others():
    pool = SimpleNamespace(texts=["alpha common", "alpha common numpy", "beta common", "beta gamma common xyz"],
                           groups=np.array([0, 0, 1, 1]), group_names=["numpy", "scipy"])
    assert word_facts(pool, 1) == [("alpha", 0), ("beta", 1)]
    assert word_facts(pool, 2)[2:] == [("beta", 1), ("gamma", 1)]
    with pytest.raises(ValueError, match="`each`"): word_facts(pool, 5)


def test_every_order_is_asked():
    items = every_order([("alpha", 0), ("beta", 2)], ["x", "y", "z"])
    assert len(items) == 12 and len({(s, *o) for s, o in zip(items.stems, items.options, strict=True)}) == 12
    assert [o[g] for o, g in zip(items.options, items.gold, strict=True)] == ["x"] * 6 + ["z"] * 6
    assert np.bincount(items.gold).tolist() == [4, 4, 4] and items.stems[0] == "Answer for alpha:"


def test_seeds_are_compared_in_pairs():
    rng = np.random.default_rng(0)
    boards = np.stack([board(rng, np.linspace(0.2, 0.8, 4)[:, None], 100)[0] for _ in range(3)])
    found, y = seed_agreement(boards, np.zeros(100, dtype=int)), np.zeros(100, dtype=int)
    both = np.concatenate([boards[0], boards[2]], axis=2)
    row = leaderboard_sensitivity(both, y).loc[1]
    assert found[["first", "second"]].to_numpy().tolist() == [[0, 1], [0, 2], [1, 2]]
    assert np.isclose(found.tau[1], row.tau) and found.rank_shift[1] == row.rank_shift


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "A random GPT-2 with a word tokenizer, saved as a hub model is."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from selectbench.signals.lm import HubLM
    from selectbench.signals.text import HubModel
    folder = tmp_path_factory.mktemp("hub")
    vocab = {chr(c): i for i, c in enumerate(range(32, 127))} | {"\n": 95, "<u>": 96, "<e>": 97}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<u>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<u>", eos_token="<e>").save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"bos_token_id": 97, "eos_token_id": 97}
    config = GPT2Config(vocab_size=98, n_embd=16, n_layer=1, n_head=2, n_positions=256, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return HubLM(HubModel(str(folder)))


def test_a_hub_model_goes_through_the_protocol(hub):
    items = many(100)
    forms = [Format(), Format(order=0), Format(scoring="hybrid")]
    forms += [Format(scoring="cloze"), Format(scoring="cloze", order=2)]
    scores = format_scores([hub, fake(Unigram())], items, forms)
    assert scores.shape == (2, 100, 5, 4) and np.isfinite(scores).all() and (scores[:, :, 3] == scores[:, :, 4]).all()
    chance = correct(scores, items.gold).mean(1)[[2, 3], 0]
    assert (np.abs(chance - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 100)).all()
    assert len(leaderboard_sensitivity(scores, items.gold, draws=9)) == 5


def test_a_hub_model_can_be_tested_for_contamination(hub):
    "Its log-probabilities are those of the module itself; the permutation test keeps its level roughly."
    items = [f"item {w}\n" for w in "one two three four five six seven eight nine ten eleven twelve".split()]
    text = "".join(items[i] for i in (3, 0, 7))
    ids = torch.tensor([[97, *hub.hub.tokenizer(text, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad(): logp = torch.log_softmax(hub.model("cpu")(ids).logits[0, :-1], -1)
    exact = logp[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum().item()
    assert np.isclose(sequence_log_probs(hub, items, [[3, 0, 7]])[0], exact, atol=1e-3)
    row = contamination_test(hub, items, shards=4, permutations=19)
    assert len(row) == 1 and 0 < row.p_value.item() <= 1 and 0.05 <= row.permutation_p_value.item() <= 1


@pytest.mark.parametrize(("call", "name"), [
    (lambda: Questions([], [], []), "questions"),
    (lambda: Questions(["a"], [["x"]], [0]), "options"),
    (lambda: Questions(["a", "b"], [["x", "y"], ["x", "y", "z"]], [0, 0]), "options"),
    (lambda: Questions(["a"], [["x", "y"]], [2]), "gold"),
    (lambda: Questions(["a"], [["x", "y"]], [0], ["s", "t"]), "stems"),
    (lambda: Format("AAB"), "symbols"),
    (lambda: Format(order="sorted"), "order"),
    (lambda: Format(order=4), "order"),
    (lambda: Format(order=True), "order"),
    (lambda: Format(scoring="text"), "scoring"),
    (lambda: rendered(TWO, Format("AB")), "symbols"),
    (lambda: option_scores(fake(Unigram(), block=20), TWO, Format()), "items"),
    (lambda: option_scores(fake(Unigram()), TWO, Format(), Questions(["q"], [["a", "b"]], [0])), "symbols"),
    (lambda: training_rows(TWO, [Format()], ByteTokenizer(), shots=3), "shots"),
    (lambda: correct(np.zeros((2, 3, 1, 4)), np.array([0, 1, 4])), "y"),
    (lambda: leaderboard_sensitivity(np.zeros((1, 3, 2, 4), np.float32), np.array([0, 1, 3])), "rating_logits"),
    (lambda: leaderboard_sensitivity(np.zeros((2, 3, 2, 4), np.float32), np.array([0, 1, 3]), baseline=2), "baseline"),
    (lambda: delimiter_brittleness(np.zeros((2, 3, 2, 4), np.float32), np.array([0, 1, 3]), draws=0), "draws"),
    (lambda: seed_agreement(np.zeros((1, 2, 3, 2, 4)), np.array([0, 1, 3])), "scores"),
])
def test_bad_input(call, name):
    with pytest.raises(ValueError, match=f"`{name}`"): call()
