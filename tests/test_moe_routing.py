"""Every router in the same small model: equal, causal where it says so, measured right, and cached."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from selectbench.core.study import summarise
from selectbench.moe.routing import (
    LEAK,
    compare_routers,
    future_leak,
    losses_without_future,
    routed_lm,
    router_rows,
    router_run,
    routing_outcome,
    row_facts,
    run_routers,
    text_parts,
    watching,
)
from selectbench.nn.moe import MoELayer, TopK
from selectbench.nn.routers import RandomRouting
from selectbench.pools.text import docstrings
from selectbench.zoo.lm import score_blocks, train_lm
from selectbench.zoo.tokenizer import ByteTokenizer, pack

SMALL = {"width": 16, "active": 12, "total": 96, "layers": 2, "heads": 2, "block": 32}
TOKENIZER = ByteTokenizer()
ROWS = router_rows(8, **SMALL)
AHEAD = ("expert choice", "smear")


@pytest.fixture(scope="module")
def texts(): return [t[:300] for t in docstrings(("numpy",)).texts[:60]]


@pytest.fixture(scope="module")
def blocks(texts):
    rows = pack(texts, TOKENIZER, SMALL["block"])
    return rows[rows.mask.all(1)][:6]


def untrained(name, seed=0):
    "A model of the row with weights ten times the usual, so that routers have something to say."
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = ROWS[name](vocab_size=TOKENIZER.vocab_size).eval()
        with torch.no_grad():
            for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
                for p in layer.router.parameters(): p.copy_(torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", ROWS)
def test_every_row_says_whether_it_looks_ahead(name, blocks):
    "Rows that look ahead are caught; all others say the same prefix by prefix as on whole rows."
    model = untrained(name)
    leak = future_leak(model, blocks)
    assert (leak > LEAK) == (name in AHEAD)
    if name in AHEAD or name == "switch": return      # how many seats there are depends on the length of what is read
    assert np.allclose(losses_without_future(model, blocks[:1]), score_blocks(model, blocks[:1], 1), atol=1e-4)


@pytest.mark.parametrize("name", [n for n in ROWS if not n.startswith("dense")])
def test_every_row_counts_its_tokens(name, blocks):
    "Each layer sees every token once, and no more pairs are served than the row has experts for."
    with watching(untrained(name)) as seen: score_blocks(untrained(name), blocks, 3)
    assert len(seen) == 2 and all(s["tokens"] == 0 for s in seen)      # it watches the model it was given, no other
    model = untrained(name)
    with watching(model) as seen: score_blocks(model, blocks, 3)
    for s in seen:
        assert s["tokens"] == blocks.documents.size and 0 < s["served"] <= s["tokens"]
        assert s["served"] <= s["load"].sum() <= s["tokens"] * len(s["load"])
    score_blocks(model, blocks, 3)
    assert seen[0]["tokens"] == blocks.documents.size                   # hooks are gone


def test_rows_are_equal():
    "Neurons in all are the same in every row but the dense one, and parameters but for the router's."
    facts = row_facts(ROWS)
    assert set(facts["neurons in all"].drop("dense")) == {SMALL["total"]}
    body = facts["parameters"] - facts["router parameters"]
    assert body.drop("dense").nunique() == 1


def test_a_run_is_repeatable_and_cached(texts, tmp_path, monkeypatch):
    "The same call gives the same numbers, from the cache the second time; the global generator stays where it was."
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path)); monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "rw")
    go = partial(router_run, ROWS["sparsely gated"], texts[10:], texts[:10], 1000, 1, tokenizer=TOKENIZER, block=32,
                 batch_size=4)
    state = torch.random.get_rng_state()
    first, second = go(), go()
    assert torch.equal(state, torch.random.get_rng_state())
    assert not first.pop("cached") and second.pop("cached")
    same = {k: (first[k], second[k]) for k in first}
    assert all(a == b or np.isnan(a) and np.isnan(b) for a, b in same.values())


def test_the_loss_is_that_of_packed_rows_per_byte(texts):
    lm = train_lm(ROWS["top-k"], texts[10:], 500, 0, tokenizer=TOKENIZER, block=32, batch_size=4, checkpoint_every=0)
    nats = score_blocks(lm.model("cpu"), pack(texts[:10], TOKENIZER, 32)).sum(dtype=np.float64)
    assert np.isclose(routing_outcome(lm, texts[:10])["loss"], nats / sum(len(t.encode()) + 1 for t in texts[:10]))


def test_run_routers_and_compare(texts):
    "A tidy frame, one row a run; held-out documents are those of the seed; the summary is paired by seed."
    rows = {"random": routed_lm(RandomRouting, 2, **SMALL), "top-k": routed_lm(TopK, 2, **SMALL)}
    runs = run_routers(rows, texts, [300, 600], [0, 1], tokenizer=TOKENIZER, n_held_out=10, block=32, batch_size=4)
    assert len(runs) == 8 and set(runs["tokens"]) == {300, 600} and runs["loss"].between(2, 7).all()
    train, held_out = text_parts(texts, 10, 1)
    assert len(held_out) == 10 and sorted(train + held_out) == sorted(texts)
    told = summarise(compare_routers(runs)).set_index(["method", "budget"])
    wide = runs[runs["tokens"] == 600].pivot(index="seed", columns="router", values="loss")
    assert np.isclose(told.loc[("top-k", 600), "gain"], (wide["random"] - wide["top-k"]).mean())
    ahead = runs.assign(leak=np.where((runs["router"] == "top-k") & (runs["seed"] == 1), 1.0, 0.0))
    assert set(compare_routers(ahead)["method"]) == {"random"}
    assert set(compare_routers(runs, bounds=("top-k",))["method"]) == {"random"}


def test_bad_input(texts):
    "Errors name the argument."
    bad = {"active": lambda: routed_lm(TopK, 5, active=12, total=96), "n_held_out": lambda: text_parts(texts, 0, 0),
           "total": lambda: routed_lm(TopK, 1, active=12, total=100),
           "widths": lambda: routed_lm(TopK, widths=[3, 4], active=12, total=96),
           "runs": lambda: compare_routers(pd.DataFrame({"router": ["a"], "tokens": [1], "seed": [0], "leak": [0.0]}))}
    for word, call in bad.items():
        with pytest.raises(ValueError, match=f"`{word}`"): call()
