"""Removal of blocks and scans from Mamba models: the loop, the surgeon, what is refused, nothing left behind."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from selectbench.core.conformance import check_method
from selectbench.core.selection import Selection
from selectbench.core.study import Study
from selectbench.core.task import Task, requested
from selectbench.core.vocabulary import sample_signals
from selectbench.nn.scan import fast_scan
from selectbench.ssm.compress import (
    best_subset, fast_mamba, mamba_shedder, one_shot, parts, shed, shedding_loss, shedding_task, without,
)
from selectbench.zoo.lm import build, train_lm
from selectbench.zoo.text_task import held_out_loss
from selectbench.zoo.tokenizer import pack

SIZES = {"vocab_size": 50, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 4, "expand": 2,
         "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
HEADS = {"mamba": {}, "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8}}
IDS = torch.tensor(np.random.default_rng(1).integers(1, 50, (2, 12)))
SOME = np.array([True, False, False, True])
CASES = pytest.mark.parametrize(("kind", "of"), [(kind, of) for kind in HEADS for of in ("blocks", "ssms")])


def loud(kind, **more):
    "A model with random weights, large enough for every part to matter."
    model = build({"config": {"model_type": kind, **SIZES, **HEADS[kind], **more}}).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if (p.ndim > 1 and "A_log" not in name) or name.endswith((".D", "conv1d.bias")):
                p.normal_(0, 0.4, generator=draw)
    return model


@torch.no_grad()
def logits(model): return model(IDS).logits


def pairwise(n, seed):
    rng = np.random.default_rng(seed)
    single, pair = rng.gamma(2, size=n), np.triu(rng.normal(size=(n, n)), 1)
    return lambda kept: float(single @ ~kept + ~kept @ pair @ ~kept)


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_the_naive_loop_and_never_beats_the_best_subset(seed):
    loss, n, k, gone = pairwise(8, seed), 8, 1 + seed % 8, []
    while len(gone) < n - k:
        tried = {j: loss(~np.isin(np.arange(n), [*gone, j])) for j in range(n) if j not in gone}
        gone.append(min(tried, key=tried.get))
    out = mamba_shedder(loss, n, k)
    assert out.info["removed"].tolist() == gone and set(out.index) == set(range(n)) - set(gone)
    assert out.score[gone].tolist() == list(range(n - k)) and sorted(out.score) == list(range(n))
    assert loss(out.mask()) >= best_subset(loss, n, k).info["loss"]
    assert loss(one_shot(loss, n, k).mask()) >= best_subset(loss, n, k).info["loss"]


def test_conformance_and_the_smallest_pool():
    check_method("mamba_shedder")
    assert mamba_shedder(lambda kept: 1 / 0, 1, 1).index.tolist() == [0]  # nothing to measure


def test_it_asks_a_task_for_nothing_beyond_what_it_declares():
    signals, asked = sample_signals(["kept_loss", "n"]), []  # the conformance check from which the method is exempt
    task = Task("parts", signals=signals, evaluate=lambda selection, seed: {}, fingerprint="parts")
    values = {name: task.signal(name) for name in signals}
    token = requested.set(asked)
    try: out = mamba_shedder(**values, k=5)
    finally: requested.reset(token)
    assert not asked and np.array_equal(out.index, mamba_shedder(**signals, k=5).index)


def test_an_infinite_loss_is_never_chosen_and_nan_is_refused():
    loss = pairwise(5, 0)
    bad = lambda value: lambda kept: loss(kept) if kept[2] else value
    assert 2 in mamba_shedder(bad(np.inf), 5, 1).index
    with pytest.raises(ValueError, match="`kept_loss`"): mamba_shedder(bad(np.nan), 5, 2)


@CASES
def test_shed_is_without_on_disk_and_in_generation(kind, of, tmp_path):
    model = loud(kind)
    whole, before = logits(model), {name: v.clone() for name, v in model.state_dict().items()}
    state = torch.get_rng_state()
    small = shed(model, SOME, of)
    assert torch.equal(state, torch.get_rng_state())
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    write = lambda m: m.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    with without(model, SOME, of):
        cut, written = logits(model), write(model)
    assert torch.equal(logits(model), whole) and not torch.allclose(cut, whole, atol=1e-2)
    assert torch.allclose(logits(small), cut, atol=1e-6) and torch.allclose(logits(again), cut, atol=1e-6)
    assert torch.equal(write(small), written)  # with caches, token by token
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert small.config.num_hidden_layers == (2 if of == "blocks" else 4) and model.config.num_hidden_layers == 4
    config, pair = shed((model.config, model.state_dict()), SOME, of)
    assert pair.keys() == small.state_dict().keys() and config.num_hidden_layers == small.config.num_hidden_layers


@pytest.mark.parametrize("kind", HEADS)
def test_nesting_is_shedding_twice_also_on_the_fast_scan(kind):
    model, ssms = loud(kind), np.array([True, True, True, False])
    twice = shed(shed(model, ssms, "ssms"), SOME, "blocks")
    with without(model, ssms, "ssms"), without(model, SOME): inside = logits(model)
    with fast_scan(model), without(model, SOME), without(model, ssms, "ssms"): fast = logits(model)
    assert torch.allclose(logits(twice), inside, atol=1e-6) and torch.allclose(fast, inside, atol=1e-4)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("kind", HEADS)
def test_a_model_without_scans_looks_back_only_through_its_convolutions(kind):
    model = loud(kind)
    changed = IDS.clone(); changed[:, 0] = (changed[:, 0] + 7) % 50
    kept = np.array([True, False, False, False])
    tail = shed(shed(model, kept, "ssms"), ~kept)  # three blocks, none with a scan: 3 x 3 positions of history
    with torch.no_grad():
        a, b = tail(IDS).logits, tail(changed).logits
        whole = (model(IDS).logits - model(changed).logits).abs().amax((0, 2))
    gap = (a - b).abs().amax((0, 2))
    assert gap[:10].min() > 0 and gap[10:].max() == 0 < whole[10:].min()


@CASES
def test_the_model_is_whole_again_after_an_error(kind, of):
    model = loud(kind)
    whole = logits(model)
    with pytest.raises(KeyError), without(model, SOME, of): raise KeyError
    assert torch.equal(logits(model), whole)


def test_no_bias_and_the_bare_model():
    model = loud("mamba2", use_conv_bias=False)
    with without(model, SOME, "ssms"): cut = logits(model)
    assert torch.allclose(logits(shed(model, SOME, "ssms")), cut, atol=1e-6)
    assert parts(model.backbone) == [f"block {i}" for i in range(4)] and parts(model, "ssms")[1] == "ssm 1"
    with torch.no_grad(), without(model.backbone, SOME): inside = model.backbone(IDS).last_hidden_state
    assert torch.allclose(shed(model.backbone, SOME)(IDS).last_hidden_state, inside, atol=1e-6)


def test_bad_input_is_named():
    model = loud("mamba")
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=4,
                                         num_attention_heads=2))
    calls = [("kept", model, np.zeros(4, bool), "blocks"), ("kept", model, np.ones(5, bool), "ssms"),
             ("kept", model, np.ones(4), "blocks"), ("kept", model, [0, 1], "blocks"), ("of", model, SOME, "heads"),
             ("model", llama, SOME, "blocks")]
    for name, which, kept, of in calls:
        with pytest.raises(ValueError, match=f"`{name}`"): shed(which, kept, of)
        with pytest.raises(ValueError, match=f"`{name}`"), without(which, kept, of): pass
    with pytest.raises(ValueError, match="`model`"): shed((llama.config, llama.state_dict()), SOME)
    with pytest.raises(ValueError, match="`model`"): shed((model.config, {}), SOME)
    odd = loud("mamba2", hidden_act="sigmoid")
    with pytest.raises(ValueError, match="`model`"), without(odd, SOME, "ssms"): pass
    with pytest.raises(ValueError, match="`n`"): best_subset(lambda kept: 0.0, 40, 20)
    with pytest.raises(ValueError, match="`k`"): best_subset(lambda kept: 0.0, 4, 5)
    with pytest.raises(ValueError, match="`kind`"): fast_mamba(50, kind="llama")


@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_of_a_trained_model(kind):
    texts = ["the sum of the array", "return the mean of the values", "an axis of the array is summed"] * 4
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 3, **HEADS[kind]}
    lm = train_lm(partial(fast_mamba, kind=kind, **sizes), texts, 512, block=16, batch_size=4, checkpoint_every=0)
    loss = shedding_loss(lm, texts[:3])
    full = loss(np.ones(3, bool))
    assert loss(np.ones(3, bool)) == full and len(loss.known) == 1
    out = mamba_shedder(loss, 3, 1)
    assert isinstance(out, Selection) and len(loss.known) == 1 + out.cost["forward"]
    small, rows = shed(lm.model(), out.mask()), pack(texts[:3], lm.tokenizer, 16)
    with torch.no_grad(): given = small(torch.tensor(rows.tokens[:, :-1]).long()).logits
    nats = F.cross_entropy(given.transpose(1, 2), torch.tensor(rows.tokens[:, 1:]).long(), reduction="none").numpy()
    assert np.isclose(loss(out.mask()), nats[rows.mask].mean(), rtol=1e-4) and loss(out.mask()) != full
    with pytest.raises(ValueError, match="`kept`"): loss(np.zeros(3, bool))
    with pytest.raises(ValueError, match="`texts`"): shedding_loss(lm, [])
    assert small.config.num_hidden_layers == 1


def test_the_task_of_a_study():
    texts = [f"the {a} of the {b} is {c}" for a in ("sum", "mean", "rank") for b in ("array", "axis") for c in "abc"]
    lm = train_lm(partial(fast_mamba, hidden_size=16, state_size=4, num_hidden_layers=3), texts[:9], 512, block=16,
                  batch_size=4, checkpoint_every=0)
    task, everything = shedding_task(lm, texts[:9], texts[9:], n_texts=4, n_test=9), Selection(np.arange(3), n=3)
    assert task.n == 3 and task.fold(1).fingerprint != task.fingerprint
    assert np.isclose(task.evaluate(everything)["neg_loss"], -held_out_loss(lm, texts[9:]))  # all nine are drawn
    kept = mamba_shedder(task.signal("kept_loss"), 3, 2)
    small = shed(lm.model(), kept.mask())
    assert np.isclose(task.evaluate(kept)["neg_loss"], -held_out_loss(lm, texts[9:], small), rtol=1e-5)
    results = Study(task, ["mamba_shedder"], [1, 2], 2).run()
    assert set(results["method"]) == {"mamba_shedder", "random", "everything"} and results["value"].notna().all()
    with pytest.raises(ValueError, match="`test_texts`"): shedding_task(lm, texts, texts)
