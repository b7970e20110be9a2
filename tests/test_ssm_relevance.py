"Relevance: the authors' numbers, conservation and its breaks, a model left as it was, deletion against single passes."
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from selectbench.core.conformance import check_method
from selectbench.core.vocabulary import sample_signals
from selectbench.nn.scan import fast_scan, selective_scan
from selectbench.ssm.relevance import (
    RULES,
    conservation,
    conserving,
    deletion_area,
    deletion_curve,
    deletion_gap,
    explain,
    gradient_x_input,
    integrated_gradients,
    judge,
    labelled_rows,
    leave_one_out,
    mambalrp,
    rankings,
    scan_relevance,
)

NAMES = ("scan_input", "scan_delta", "scan_a", "scan_b", "scan_c")
OPTIONS = {"mamba": dict(state_size=8),
           "mamba2": dict(state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=16)}
IDS = np.random.default_rng(0).integers(0, 64, 20)


def tiny(kind, scale=0.2, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        kind, **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, **OPTIONS[kind], **options}))
    for p in model.parameters(): p.data.add_(scale * torch.randn_like(p))
    return model.eval()


def unbiased(model):
    for name, p in model.named_parameters():
        if name.endswith("bias") and "dt" not in name: p.data.zero_()
    return model


def logits(model, ids):
    with torch.no_grad(): return model(torch.as_tensor(ids)[None], use_cache=False).logits[0]


def test_conforms(): check_method("scan_relevance")


@pytest.mark.parametrize("bias", ("", "_nobias"))
def test_authors_numbers(bias):
    d = np.load(Path(__file__).parent / "data" / "mambalrp_reference.npz")
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**json.loads(str(d["config"]))))
    weights = {name[2:]: torch.from_numpy(d[name]) for name in d if name.startswith("w.")}
    model.load_state_dict({**weights, "lm_head.weight": weights["backbone.embeddings.weight"]})
    if bias: unbiased(model)
    stored = (d["ids"], d["targets"], d["relevance" + bias], d["logit" + bias])
    for ids, target, theirs, logit in zip(*stored, strict=True):
        np.testing.assert_allclose(mambalrp(model, ids, int(target)), theirs, rtol=1e-3, atol=2e-5)
        assert np.isclose(logits(model, ids.astype(int))[-1, target], logit, atol=2e-5)
        assert np.abs(gradient_x_input(model, ids, int(target)) - theirs).max() > 0.05


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("fast", (False, True))
def test_conserves_without_biases(kind, fast):
    model = unbiased(tiny(kind))
    if fast: fast_scan(model, permanent=True)
    for ids in (IDS, IDS[:1], IDS[::-1].copy()):
        target = int(logits(model, ids)[-1].abs().argmax())
        logit = float(logits(model, ids)[-1, target])
        assert abs(mambalrp(model, ids, target).sum() - logit) < 1e-4 * abs(logit)


@pytest.mark.parametrize("kind", OPTIONS)
def test_conserves_with_biases(kind):
    model = tiny(kind, **({"use_bias": True} if kind == "mamba" else {}))
    model.backbone.layers[0].mixer.conv1d.bias.requires_grad_(False)
    for target in (5, 9):
        parts = conservation(model, IDS, target)
        assert abs(parts.gap) < 1e-4 * max(parts[["logit", "tokens", "biases"]].abs()) and abs(parts.biases) > 1e-3
    assert not model.backbone.layers[0].mixer.conv1d.bias.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_needed(kind, rule):
    model = unbiased(tiny(kind))
    parts = conservation(model, IDS, 5, rules=tuple(r for r in RULES if r != rule))
    assert abs(parts.gap) > 0.05 * abs(parts.logit)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("rules", (RULES, ("gate",), ()))
def test_outputs_stay(kind, rules):
    model = tiny(kind)
    plain = logits(model, IDS)
    with conserving(model, rules): np.testing.assert_allclose(logits(model, IDS), plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, IDS), plain)


def test_no_rules_is_the_gradient():
    model = tiny("mamba")
    read = model.get_input_embeddings()(torch.from_numpy(IDS)[None]).detach().requires_grad_()
    gradient, = torch.autograd.grad(model(inputs_embeds=read).logits[0, -1, 5], read)
    plain = (gradient * read)[0].sum(-1).detach()
    np.testing.assert_allclose(gradient_x_input(model, IDS, 5), plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fast", (False, True))
def test_model_is_left_as_it_was(fast):
    model = tiny("mamba2").train()
    undo = fast_scan(model, permanent=True) if fast else lambda: None
    before = {name: vars(m).get("forward") for name, m in model.named_modules()}
    with pytest.raises(RuntimeError, match="inside"), conserving(model), conserving(model, ("scan",)):
        assert not model.training
        raise RuntimeError("inside")
    with pytest.raises(IndexError): mambalrp(model, np.array([64]))
    assert model.training and before == {name: vars(m).get("forward") for name, m in model.named_modules()}
    undo()
    assert not any("forward" in vars(m) for m in model.modules())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 60), st.integers(0, 100))
def test_scan_relevance_is_gradient_x_input_of_the_scan(block, seed):
    signals = sample_signals(NAMES, seed=seed)
    u, delta, a, b, c = (torch.from_numpy(np.asarray(signals[n]).T.copy()).double() for n in NAMES)
    u = u[None].requires_grad_()
    y, _ = selective_scan(u, delta[None], a.T, b[None], c[None])
    frame = scan_relevance(**signals, block=block)
    whole = frame.pivot(index="position", columns="source", values="relevance").fillna(0).to_numpy()
    for i in (0, len(whole) // 2, len(whole) - 1):
        gradient, = torch.autograd.grad(y[0, :, i].sum(), u, retain_graph=True)
        np.testing.assert_allclose(whole[i], (gradient * u)[0].sum(0).detach(), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(whole.sum(1), y[0].sum(0).detach(), rtol=1e-6, atol=1e-8)
    assert (frame.absolute >= frame.relevance.abs() - 1e-9).all()


@pytest.mark.parametrize("kind", OPTIONS)
def test_integrated_gradients_add_up(kind):
    model = tiny(kind)
    empty = model(inputs_embeds=model.get_input_embeddings()(torch.full((1, 20), 7))).logits[0, -1, 5].item()
    change = logits(model, IDS)[-1, 5].item() - empty
    assert abs(integrated_gradients(model, IDS, 5, baseline=7, steps=256).sum() - change) < 1e-2 * abs(change)


def slowly(model, ids, order, target, replacement):
    out = []
    for n in range(len(order) + 1):
        gone = order[:n]
        left = np.where(np.isin(np.arange(len(ids)), gone), replacement or 0, ids)
        if replacement is None: left = np.delete(ids, gone)
        out.append(float(torch.log_softmax(logits(model, left)[-1], -1)[target]))
    return out


@pytest.mark.parametrize("replacement", (None, 3))
@pytest.mark.parametrize("kind", OPTIONS)
def test_deletion_against_single_passes(kind, replacement):
    model = tiny(kind)
    orders = np.stack([np.random.default_rng(s).permutation(19)[:12] for s in range(3)])
    curve = deletion_curve(model, IDS, orders, 5, replacement=replacement, batch_size=7)
    for k, order in enumerate(orders):
        mine = curve[curve.order == k]
        single = slowly(model, IDS, order, 5, replacement)
        np.testing.assert_allclose(mine.log_probability, single, rtol=1e-3, atol=1e-4)
        assert list(mine.removed) == list(range(13))
    few = deletion_curve(model, IDS, orders, 5, replacement=replacement, steps=4)
    both = few.merge(curve, on=["order", "removed"])
    assert len(both) == len(few) == 15 and np.allclose(both.logit_x, both.logit_y, atol=1e-4)


def test_gap_is_the_difference_of_areas():
    model = tiny("mamba")
    scores = np.random.default_rng(1).normal(size=(2, 20))
    gap = deletion_gap(model, IDS, scores, 5, keep=(0, -1))
    for row, out in zip(scores, gap.itertuples(), strict=True):
        falling = 1 + np.argsort(-row[1:-1])
        areas = [np.trapezoid(slowly(model, IDS, o, 5, None), dx=1 / 18) for o in (falling, falling[::-1])]
        np.testing.assert_allclose([out.most_first, out.least_first], areas, rtol=1e-3, atol=1e-4)
        assert np.isclose(out.gap, areas[1] - areas[0], rtol=1e-3, atol=1e-4)
    reverse = deletion_gap(model, IDS, -scores, 5, keep=(0, -1))
    np.testing.assert_allclose(reverse.gap, -gap.gap, atol=1e-6)
    assert deletion_area(deletion_curve(model, IDS, [0, 1], 5)).shape == (1,)


def test_explain_is_all_of_them():
    model = tiny("mamba")
    found = explain(model, IDS, 5, baseline=7, steps=4)
    assert len(found) == 20 and np.isfinite(found.to_numpy()).all()
    assert np.array_equal(found.mambalrp, mambalrp(model, IDS, 5))
    assert np.array_equal(found.integrated_gradients, integrated_gradients(model, IDS, 5, baseline=7, steps=4))


def test_labelled_rows():
    rows = labelled_rows([np.array([1, 2, 3]), np.array([4])], [1, 0], 10, 2, 2)
    assert rows.tokens.tolist() == [[12, 1, 2, 9, 11], [12, 4, 9, 10, 12]]
    assert rows.documents.tolist() == [[-1, -1, -1, 0], [-1, -1, 1, -1]]


def test_bad_arguments():
    model, signals = tiny("mamba"), sample_signals(NAMES)
    jamba = transformers.AutoModelForCausalLM.from_config(transformers.FalconMambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    cases = {"model": [lambda: mambalrp(torch.nn.Linear(2, 2), IDS), lambda: mambalrp(jamba, IDS),
                       lambda: mambalrp(tiny("mamba", hidden_act="gelu"), IDS)],
             "rules": [lambda r=r: mambalrp(model, IDS, rules=r) for r in (("scam",), "scan")],
             "ids": [lambda: mambalrp(model, np.zeros((2, 3), int)), lambda: mambalrp(model, IDS.astype(float))],
             "target": [lambda t=t: mambalrp(model, IDS, t) for t in (64, -1, 1.5, True)],
             "steps": [lambda: integrated_gradients(model, IDS, steps=0),
                       lambda: deletion_curve(model, IDS, [0], steps=0)],
             "baseline": [lambda: integrated_gradients(model, IDS, baseline=64)],
             "order": [lambda o=o: deletion_curve(model, IDS, o)
                       for o in ([0, 0], [20], [-1], [0.5], np.arange(20), [[]])],
             "y": [lambda: labelled_rows([IDS], [3], 64, 3, 30)],
             "scores": [lambda s=s: deletion_gap(model, IDS, s) for s in (np.ones(19), np.full(20, np.nan))],
             "scan_input": [lambda: scan_relevance(**signals | {"scan_input": np.ones((3, 3))})],
             "scan_delta": [lambda: scan_relevance(**signals | {"scan_delta": -signals["scan_delta"]})]}
    for name, calls in cases.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"`{name}`"): call()


def test_judge(tmp_path, monkeypatch):
    "The curves of `judge` have the areas of `deletion_gap`; leave-one-out by single passes."
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path))
    model = tiny("mamba")
    fake = SimpleNamespace(model=lambda: model, fingerprint="a model of this test")
    found = judge(fake, [IDS[:12], IDS[5:14]], baseline=7, steps=3, draws=2)
    scores = rankings(model, IDS[5:14], np.random.default_rng([0, 1]), baseline=7, draws=2)
    for replacement, column in ((None, "log_probability"), (7, "replaced")):
        gap = deletion_gap(model, IDS[5:14], scores.T, keep=(0, -1), steps=3, replacement=replacement).gap
        mine = found[found.text == 1].pivot(index="share", columns=["ranking", "first"], values=column)
        area = mine.apply(lambda c: np.trapezoid(c, c.index))
        for name in ("mambalrp", "raw") if replacement else ("mambalrp", "recency", "without gate"):
            assert np.isclose(area[name, "least"] - area[name, "most"], gap[list(scores).index(name)], atol=1e-4)
        if replacement: continue
        drawn = gap[[k for k, name in enumerate(scores) if name.startswith("random")]].mean()
        assert np.isclose(area["random", "least"] - area["random", "most"], drawn, atol=1e-4)
    target = int(logits(model, IDS)[-1].argmax())
    whole = slowly(model, IDS, [], target, None)[0]
    single = [whole - slowly(model, IDS, [k], target, None)[1] for k in range(19)]
    np.testing.assert_allclose(leave_one_out(model, IDS), [*single, 0], rtol=1e-3, atol=1e-4)
