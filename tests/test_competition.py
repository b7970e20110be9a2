"""Routers that look at the experts: authors' numbers, gradients, masks, causality, schedules, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from selectbench.core.conformance import check_method
from selectbench.nn.competition import (
    AGGREGATE,
    SMEAR,
    VISION,
    AvgK,
    CompeteSMoE,
    CompeteSMoE2024,
    SegmentSMEAR,
    coefficients,
    distillation,
    mean_keys,
    merged,
    plan_contests,
    responses,
    segments,
    similarity,
)
from selectbench.nn.moe import Context, Experts, MoELayer, moe_lm

known = np.load(Path(__file__).parent / "data" / "competition_reference.npz")
R = {name: torch.from_numpy(known[name]) for name in known.files}
E, WIDE, D = R["gate"].shape


def near(a, b): return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=1e-5, atol=1e-5)


def layer_of(router, experts=None):
    torch.manual_seed(0)
    return MoELayer(router, experts or Experts(router.width, router.n_experts, WIDE, std=0.5)).double()


def authors_layer(router):
    layer = layer_of(router)
    with torch.no_grad():
        layer.experts.gate.copy_(R["gate"]), layer.experts.up.copy_(R["up"]), layer.experts.down.copy_(R["down"])
        router.gate.weight.copy_(R["router"])
        if router.gate.bias is not None: router.gate.bias.zero_()
    return layer


# the authors' numbers

@pytest.mark.parametrize("hybrid, winners", [("plain", 0.0), ("hybrid", 0.6)])
def test_competesmoe_gives_the_authors_losses_one_by_one(hybrid, winners):
    one = {"distill": 1.0, "diversity": 1.0, "balance_contest": 1.0, "balance": 1.0, "z": 1.0}
    contest = authors_layer(CompeteSMoE(D, E, steps=1, rate=1.0, winners=winners, **one))
    contest(R["hidden"])
    losses = contest.routing.losses
    run = f"v2_{hybrid}_competition"
    assert near(losses["distillation"].detach(), R[f"{run}_routerloss"])
    assert near(losses["diversity"].detach(), R[f"{run}_diversity_loss"])
    assert near(losses["balance"].detach(), R[f"{run}_balance_loss"])
    assert torch.equal(contest.routing.experts, R["v2_experts"])
    assert near(contest.routing.weights.detach(), R["v2_weights"])
    assert near(contest.routing.scores.detach(), R["v2_scores"])
    alone = authors_layer(CompeteSMoE(D, E, steps=1, rate=0.0, **one))
    alone(R["hidden"])
    assert near(alone.routing.losses["balance"].detach(), R[f"v2_{hybrid}_router_balance_loss"])
    assert near(alone.routing.losses["z"].detach(), R[f"v2_{hybrid}_router_router_z_loss"])


@pytest.mark.parametrize("form, blend", [("norm", 0.0), ("blend", 0.5)])
def test_the_first_competesmoe_gives_the_authors_numbers_and_gradients(form, blend):
    layer = authors_layer(CompeteSMoE2024(D, E, rate=1.0, distill=0.5, blend=blend))
    out = layer(R["hidden"])
    loss = layer.routing.losses["distillation"]
    (out.square().sum() + loss).backward()
    assert near(out.detach(), R[f"v1_{form}_out"]) and near(loss.detach(), R[f"v1_{form}_loss"])
    assert near(layer.router.gate.weight.grad, R[f"v1_{form}_router_grad"])
    assert near(layer.experts.w_in.grad.view(E, 2, WIDE, D)[:, 0], R[f"v1_{form}_gate_grad"])


def test_the_plan_is_the_authors_for_the_same_random_numbers():
    plan = plan_contests(200, 6, rate=0.3, at_most=2, draws=known["v2_uniform"])
    assert (plan == known["v2_schedule"]).all()


def test_smear_gives_the_authors_router():
    router = SMEAR(D, 4).double().eval()
    with torch.no_grad():
        router.weight.copy_(R["smear_weight"])
        router.norm.weight.copy_(R["smear_norm"][0]), router.norm.bias.copy_(R["smear_norm"][1])
        router.weight_norm.weight.copy_(R["smear_weight_norm"][0])
        router.weight_norm.bias.copy_(R["smear_weight_norm"][1])
    probs = router.logits(R["smear_hidden"].mean(1)).softmax(-1)
    assert near(probs.detach(), R["smear_probs"])


# contests

@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(1, 4), st.sampled_from(["softplus", "norm"]), st.integers(0, 10**6))
def test_winners_are_the_largest_responses(e, k, measure, seed):
    k = min(k, e)
    torch.manual_seed(seed)
    cls, options = (CompeteSMoE, {"steps": 1}) if measure == "softplus" else (CompeteSMoE2024, {})
    layer = layer_of(cls(5, e, k=k, rate=1.0, **options))
    x = torch.randn(6, 5, dtype=torch.float64)
    layer(x)
    for token, won in zip(x, layer.routing.experts.tolist(), strict=True):
        outs = [layer.experts.expert(i, token[None])[0].tolist() for i in range(e)]
        heard = [np.log1p(np.exp(o)).mean() if measure == "softplus" else np.sqrt(np.square(o).sum()) for o in outs]
        assert sorted(won) == sorted(np.argsort(heard)[::-1][:k])
    assert torch.allclose(layer.routing.weights.sum(1), torch.ones(6, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 2))
def test_the_lesson_is_zero_if_and_only_if_it_is_learnt(seed, theta):
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(4, 5, generator=g).double().softmax(-1) for _ in range(2))
    won = q.topk(2).indices
    assert distillation(p, p, won, theta) == 0 < distillation(p, q, won, theta)
    by_hand = ((p - q) ** 2).mean() + theta * np.mean([(p[i, j] - q[i, j]) ** 2 for i in range(4) for j in won[i]])
    assert distillation(p, q, won, theta) == pytest.approx(float(by_hand))


def test_similarity_is_the_mean_cosine_with_an_empty_diagonal():
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    table = F.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
    assert similarity(x) == pytest.approx(float((table.sum((1, 2)) - 3).mean() / 9))
    assert similarity(x[:, :1]) == pytest.approx(0)


def reached(layer, loss):
    layer.zero_grad()
    out = layer(R["hidden"])
    (out.sum() if loss == "model" else layer.routing.losses[loss]).backward()
    return {n.split(".")[0] for n, p in layer.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("router, loss, who", [
    (CompeteSMoE(D, E, steps=9, rate=1.0), "distillation", {"router"}),
    (CompeteSMoE(D, E, steps=9, rate=1.0), "diversity", {"experts"}),
    (CompeteSMoE(D, E, steps=9, rate=1.0), "balance", {"experts"}),
    (CompeteSMoE(D, E, steps=9, rate=1.0), "model", {"experts"}),
    (CompeteSMoE(D, E, steps=9, rate=0.0), "balance", {"router"}),
    (CompeteSMoE(D, E, steps=9, rate=0.0), "model", {"router", "experts"}),
    (CompeteSMoE2024(D, E, rate=1.0), "distillation", {"router", "experts"}),
    (CompeteSMoE2024(D, E, rate=1.0), "model", {"experts"}),
    (CompeteSMoE2024(D, E, rate=0.0), "model", {"router", "experts"}),
    (AvgK(D, E), "model", {"experts"}),
    (SMEAR(D, E, scale=1.0), "model", {"router", "experts"}),
])
def test_gradients_reach_whom_they_should(router, loss, who):
    assert reached(layer_of(router), loss) == who


@pytest.mark.parametrize("make", [lambda: CompeteSMoE(6, 5, steps=9, rate=1.0), lambda: CompeteSMoE2024(6, 5, rate=1.0),
                                  lambda: CompeteSMoE(6, 5, steps=9, rate=0.0), lambda: AvgK(6, 5),
                                  lambda: SMEAR(6, 5, dropout=0.0), lambda: SegmentSMEAR(6, 5, segment=3, dropout=0.0)])
def test_padding_changes_nothing(make):
    layer = layer_of(make())
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
    y, losses = layer(x, mask), layer.routing.losses
    other = layer(torch.where(mask[..., None], x, torch.randn_like(x)), mask)
    assert torch.allclose(y, other) and not y[~mask].any()
    assert all(torch.allclose(v, layer.routing.losses[k]) for k, v in losses.items())


def test_in_evaluation_there_is_no_contest():
    layer = layer_of(CompeteSMoE(6, 5, steps=1, rate=1.0)).eval()
    layer(torch.randn(4, 6, dtype=torch.float64))
    assert layer.routing.info == {"contest": False}
    layer.train()(torch.randn(4, 6, dtype=torch.float64))
    assert layer.routing.info == {"contest": True}
    layer(torch.randn(4, 6, dtype=torch.float64))
    assert layer.routing.info == {"contest": False}            # after the last planned step


# when

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(1, 6), st.floats(0, 1), st.floats(0, 0.9), st.integers(1, 4), st.integers(0, 9))
def test_a_plan_keeps_its_promises(steps, layers, rate, warm_up, at_most, seed):
    options = {"rate": rate, "warm_up": warm_up, "at_most": at_most, "seed": seed}
    plan, start = plan_contests(steps, layers, **options), int(warm_up * steps)
    assert plan.shape == (layers, steps) and not plan[:, :start].any() and plan.sum(0).max() <= at_most
    assert (plan[0] == plan_contests(steps, 1, **options)[0]).all()
    draws = np.random.default_rng(seed).random((layers, steps - start))
    if at_most >= layers: assert (plan[:, start:] == (draws < rate)).all()


def test_routers_of_one_model_share_one_plan():
    plan = plan_contests(50, 3, rate=0.4, at_most=1, seed=5)
    rows = [CompeteSMoE(6, 4, i, steps=50, rate=0.4, at_most=1, seed=5).plan for i in range(3)]
    assert (np.stack(rows) == plan).all() and plan.sum(0).max() == 1


def test_the_coin_of_2024_is_fair_and_its_falling_rate_lasts_a_period():
    router = CompeteSMoE2024(6, 4, rate=0.3)
    tosses = np.array([router.competes(s) for s in range(3000)])
    assert abs(tosses.mean() - 0.3) < 4 * np.sqrt(0.21 / 3000)
    assert (tosses != [CompeteSMoE2024(6, 4, 1, rate=0.3).competes(s) for s in range(3000)]).any()
    falling = [CompeteSMoE2024(6, 4, layer, rate=None, period=10) for layer in range(400)]
    for t in (0, 8):
        held = np.array([[r.competes(s) for s in (10 * t, 10 * t + 9)] for r in falling])
        p = 2 / (2 + np.sqrt(1 + t))
        assert (held[:, 0] == held[:, 1]).all() and abs(held.mean() - p) < 4 * np.sqrt(p * (1 - p) / 400)


# Avg-K

@pytest.mark.parametrize("keys, j", [("gate", 0), ("up", 1)])
def test_avg_k_scores_by_the_mean_pre_activation_of_experts_of_any_width(keys, j):
    layer = layer_of(AvgK(6, 3, keys=keys), Experts(6, widths=[2, 5, 3], std=0.5))
    x = torch.randn(4, 6, dtype=torch.float64)
    y, routing = layer(x), layer.routing
    by_hand = torch.stack([(x @ layer.experts.weights(i)[j].T).mean(1) for i in range(3)], 1)
    assert torch.allclose(routing.scores, by_hand) and not routing.scores.requires_grad
    assert mean_keys(layer.experts, keys).shape == (3, 6) and not list(layer.router.parameters())
    every = layer.experts.every(x)
    assert torch.allclose(y, sum(every[torch.arange(4), routing.experts[:, a]] for a in range(2)))


@pytest.mark.parametrize("score", AGGREGATE)
def test_direct_forms_see_the_cells_that_make_the_output(score):
    layer = layer_of(AvgK(6, 3, score=score))
    x = torch.randn(4, 6, dtype=torch.float64)
    layer(x)
    for i in range(3):
        m = coefficients(layer.experts, i, x)
        assert torch.allclose(m @ layer.experts.weights(i)[2].T, layer.experts.expert(i, x))
        by_hand = {"mean": m.mean(1), "abs": m.abs().mean(1), "max": m.max(1)[0]}
        assert torch.allclose(layer.routing.scores[:, i], by_hand[score])


# SMEAR

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.sampled_from([None, 1, 3, 8]), st.integers(0, 10**6))
def test_smear_is_one_expert_with_averaged_weights(b, t, e, segment, seed):
    torch.manual_seed(seed)
    layer = layer_of(SMEAR(6, e, segment=segment, scale=1.0)).eval()
    x = torch.randn(b, t, 6, dtype=torch.float64)
    y, size = layer(x), segment or t
    shares = layer.routing.weights.view(b, t, e)
    assert torch.allclose(shares.sum(-1), torch.ones(b, t, dtype=torch.float64))
    for row in range(b):
        for at in range(t):
            s = at // size
            if segment is None: p = layer.router.logits(x[row].mean(0)).softmax(-1)
            elif s == 0: p = torch.full((e,), 1 / e, dtype=torch.float64)
            else: p = layer.router.logits(x[row, (s - 1) * size: s * size].mean(0)).softmax(-1)
            gate, up, down = (sum(p[i] * layer.experts.weights(i)[j] for i in range(e)) for j in range(3))
            one = x[row, at]
            assert torch.allclose(y[row, at], down @ (F.silu(gate @ one) * (up @ one)), atol=1e-12)
            assert torch.allclose(shares[row, at], p)


def test_left_out_experts_share_nothing_and_the_rest_sum_to_one():
    router = SMEAR(6, 8, dropout=0.3).train()
    probs = torch.full((4000, 1, 8), 1 / 8)
    torch.manual_seed(0)
    kept = router.drop(probs)
    out = kept < 1e-6
    assert torch.allclose(kept.sum(-1), torch.ones(4000, 1)) and abs(out.float().mean() - 0.3) < 0.02
    assert torch.equal(router.eval().drop(probs), probs)
    nobody = SMEAR(6, 2, dropout=0.999999).train().drop(torch.tensor([[0.9, 0.1]]))
    assert torch.allclose(nobody, torch.tensor([[0.5, 0.5]]))


def small(router, options=None, width=8):
    torch.manual_seed(0)
    return moe_lm(50, router=f"selectbench.nn.competition:{router}", router_options=options, width=16, heads=2,
                  n_experts=4, expert_width=width, block=16)


@pytest.mark.parametrize("router, options, causal", [
    ("SMEAR", {"scale": 1.0}, False), ("SegmentSMEAR", {"segment": 4, "scale": 1.0}, True), ("AvgK", {}, True),
    ("CompeteSMoE", {}, True)])
def test_what_may_go_into_a_causal_model(router, options, causal):
    model = small(router, options, 64).double().eval()
    for layer in model.layers: layer.experts.w_in.data.mul_(20), layer.experts.w_out.data.mul_(20)
    ids = torch.randint(0, 50, (2, 12))
    other = ids.clone()
    other[:, 9] = (other[:, 9] + 1) % 50
    with torch.no_grad(): moved = (model(ids).logits - model(other).logits).abs().amax(-1)
    assert bool((moved[:, :9] < 1e-12).all()) == causal and (moved[:, 9:] > 1e-9).any()


# a language model, bad input, conformance

@pytest.mark.parametrize("name, options", [
    ("CompeteSMoE", {"steps": 3, "rate": 0.5}), ("CompeteSMoE2024", {"rate": 0.5}), ("AvgK", {}),
    ("SegmentSMEAR", {"segment": 4})])
def test_a_small_language_model_trains(name, options):
    model = small(name, options)
    optimiser, ids = torch.optim.Adam(model.parameters(), lr=0.01), torch.randint(0, 50, (4, 12))
    losses = []
    for _ in range(8):
        out = model(ids)
        losses.append(F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        optimiser.zero_grad()
        (losses[-1] + out.aux_loss).backward()
        optimiser.step()
    assert losses[-1] < losses[0]


ZEROS = torch.zeros(10, 6)


BOTH = (CompeteSMoE, CompeteSMoE2024)


@pytest.mark.parametrize("word, call", [
    *[("rate", lambda c=c, r=r: c(6, 4, rate=r)) for c in BOTH for r in (-0.1, 1.5, float("nan"))],
    *[("k", lambda c=c, k=k: c(6, 4, k=k)) for c in (*BOTH, AvgK) for k in (0, 5)],
    ("warm_up", lambda: CompeteSMoE(6, 4, warm_up=1.0)), ("at_most", lambda: CompeteSMoE(6, 4, at_most=0)),
    ("steps", lambda: CompeteSMoE(6, 4, steps=0)), ("steps", lambda: CompeteSMoE(6, 4)(ZEROS, Experts(6, 4, 3))),
    ("blend", lambda: CompeteSMoE2024(6, 4, blend=2.0)), ("period", lambda: CompeteSMoE2024(6, 4, period=0)),
    ("score", lambda: AvgK(6, 4, score="median")), ("keys", lambda: AvgK(6, 4, keys="down")),
    ("dropout", lambda: SMEAR(6, 4, dropout=1.0)), ("segment", lambda: SMEAR(6, 4, segment=0)),
    ("segment", lambda: SegmentSMEAR(6, 4, segment=None)),
    ("widths", lambda: MoELayer(SMEAR(6, 2), Experts(6, widths=[3, 4]))(ZEROS)),
    ("experts", lambda: SMEAR(6, 4)(ZEROS)), ("experts", lambda: AvgK(6, 4)(ZEROS, Experts(6, 5, 3))),
    ("rows", lambda: SMEAR(6, 4)(ZEROS, Experts(6, 4, 3), Context(rows=(3, 3)))),
    ("mask", lambda: MoELayer(SMEAR(6, 4), Experts(6, 4, 3))(ZEROS.view(2, 5, 6), torch.arange(10).view(2, 5) < 5)),
])
def test_bad_input_is_named(word, call):
    with pytest.raises(ValueError, match=f"`{word}`"): call()


@pytest.mark.parametrize("make", [lambda: CompeteSMoE(6, 4), lambda: CompeteSMoE2024(6, 4), lambda: AvgK(6, 4),
                                  lambda: SMEAR(6, 4), lambda: SegmentSMEAR(6, 4, segment=2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused(make, value):
    x = ZEROS.clone()
    x[3, 2] = value
    with pytest.raises(ValueError, match="`hidden`"): make()(x, Experts(6, 4, 3))


def test_a_segment_after_nothing_is_merged_equally():
    layer = MoELayer(SegmentSMEAR(6, 4, segment=2, scale=1.0), Experts(6, 4, 3)).eval()
    mask = torch.tensor([[False, False, True, True, True]])
    layer(torch.randn(1, 5, 6), mask)
    assert torch.allclose(layer.routing.info["merged"][0, :2], torch.full((2, 4), 0.25))
    assert not torch.allclose(layer.routing.info["merged"][0, 2], torch.full((4,), 0.25), atol=1e-3)


def test_what_serves_a_token_is_counted():
    experts, one = Experts(6, 4, 5), 3 * 6 * 5
    assert AvgK(6, 4, k=3).active(experts) == 3 * one + 4 * 6                    # four mean keys
    assert AvgK(6, 4, k=3, score="max").active(experts) == 3 * one + 2 * 4 * 5 * 6
    router = 4 * 6 + 2 * 2 * 6                                                   # weights and two LayerNorms
    assert SMEAR(6, 4).active(experts) == router + one
    assert SegmentSMEAR(6, 4, segment=10).active(experts) == router + one + 4 * one / 10
    assert CompeteSMoE(6, 4, k=2).active(experts) == 4 * 6 + 2 * one             # outside contests


def test_the_vision_options_are_options(): CompeteSMoE(6, 4, **VISION)


def test_pieces():
    x = torch.arange(14.0).view(14, 1)
    cut = segments(x, (2, 7), 3).squeeze(-1).tolist()
    assert cut == [[[0, 1, 2], [3, 4, 5], [6, 0, 0]], [[7, 8, 9], [10, 11, 12], [13, 0, 0]]]
    assert responses(torch.zeros(1, 1, 3)).item() == pytest.approx(np.log(2))
    assert responses(torch.tensor([[[3.0, 4.0]]]), "norm").item() == 5
    experts = Experts(6, 3, 4)
    for j, w in enumerate(merged(experts, torch.tensor([0.0, 1.0, 0.0]))): assert torch.equal(w, experts.weights(1)[j])


@pytest.mark.parametrize("name", ["competesmoe", "competesmoe_2", "avg_k", "smear", "smear_segments"])
def test_conformance(name): check_method(name)
