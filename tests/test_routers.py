"Routers against the authors' numbers, their invariants, the faults that these must find, padding, and bad input."

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from selectbench.nn import routers as R
from selectbench.nn.moe import Context, Experts, MoELayer, Routing, balance_loss, cv_squared, loads, moe_lm

REFERENCE = {k: torch.from_numpy(v) for k, v in
             np.load(Path(__file__).parent / "data" / "routers_reference.npz").items()}
ALL = [R.NoisyTopK, R.Switch, R.ExpertChoice, R.HashRouting, R.XMoE, R.HMoE, R.RMoE, R.Stratified, R.RandomRouting]


def dense(routing, e):
    "float[n, e], the weight of each expert for each token."
    out = torch.zeros(len(routing.experts), e)
    return out.scatter_add(1, routing.experts.clamp(min=0), routing.weights.float() * (routing.experts >= 0))


def put(parameter, value):
    with torch.no_grad(): parameter.copy_(value)


def close(a, b): return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def made(cls, width=8, e=8, **options):
    "A router with weights far from zero."
    torch.manual_seed(0)
    router = cls(width, e, **{"vocab_size": 50} | options) if cls is R.HashRouting else cls(width, e, **options)
    for p in router.parameters(): nn.init.normal_(p, 0, 0.7)
    return router


def context(b, t): return Context(ids=torch.arange(b * t) % 50, rows=(b, t))


# ---- the authors' numbers

@pytest.mark.parametrize("name, options", [("loose", {}), ("tight", {"capacity_factor": 1.0}),
                                           ("low", {"capacity_factor": 1.0, "threshold": 0.5})])
def test_xmoe_as_its_authors(name, options):
    router = R.XMoE(8, 16, balance=1.0, **options)
    put(router.weight, REFERENCE["x_weight"])
    routing = router(REFERENCE["x_hidden"])
    assert close(dense(routing, 16), REFERENCE[f"x_{name}_gates"])
    assert close(routing.losses["balance"], REFERENCE[f"x_{name}_loss"])


def rmoe_layers(detach=False):
    "Three MoE layers with the weights of the reference."
    layers = []
    for i in range(3):
        router, experts = R.RMoE(8, 6, i, state=5, balance=1.0, detach=detach), Experts(8, 6, 6)
        put(router.proj, REFERENCE[f"r_proj{i}"])
        put(router.weight, REFERENCE[f"r_gate{i}"])
        for j in range(6):
            for mine, name in zip(experts.weights(j), ("w1", "w3", "w2"), strict=True):
                put(mine, REFERENCE[f"r_{name}_{i}"][j])
        layers.append(MoELayer(router, experts))
    cell = layers[0].router.cell
    for kind, names in (("ih", ("ir", "iz", "in")), ("hh", ("hr", "hz", "hn"))):
        for part in ("weight", "bias"):
            put(getattr(cell, f"{part}_{kind}"), torch.cat([REFERENCE[f"r_{part}_{n}"] for n in names]))
    return layers


def test_rmoe_as_its_authors():
    x, shared = REFERENCE["r_hidden"], Context(rows=(1, 12))
    for i, layer in enumerate(rmoe_layers()):
        out = layer(x, context=shared)
        assert close(out, REFERENCE[f"r_out{i}"]) and close(shared.state["rmoe"][1], REFERENCE[f"r_state{i}"])
        assert close(layer.routing.scores, REFERENCE[f"r_logits{i}"].softmax(-1))
        assert close(2 * layer.routing.losses["balance"], REFERENCE[f"r_balance{i}"])    # theirs sums over the top 2
        x = x + out


def stratified():
    layer = MoELayer(R.Stratified(8, 8, strata=(2, 2, 4), balance=1.0), Experts(8, 8, 6))
    for i, matrix in enumerate([layer.router.weight, *layer.router.later]):
        put(matrix, REFERENCE[f"s_gate{i}"])
        put(layer.router.norms[i].weight, REFERENCE[f"s_norm{i}_w"])
        put(layer.router.norms[i].bias, REFERENCE[f"s_norm{i}_b"])
    for j in range(8):
        for mine, name in zip(layer.experts.weights(j), "gud", strict=True): put(mine, REFERENCE[f"s_{name}"][j])
    return layer


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_stratified_as_its_authors(mode):
    x, layer = REFERENCE["s_hidden"], stratified()
    out = getattr(layer, mode)()(x)
    assert close(x + out, REFERENCE[f"s_{mode}_out"])
    assert close(layer.routing.losses["balance"], REFERENCE[f"s_{mode}_loss"])
    assert set(layer.routing.info["passes"].tolist()) == {1, 2, 3}
    assert (layer.routing.info["dropped"] > 0) == (mode == "train")


class PostNorm(R.Stratified):
    "The residual connection carries the normalised state, from the second stratum on."
    def run(self, hidden, experts, context):
        stream, before = hidden, torch.zeros(len(hidden), dtype=torch.int64)
        for i, norm in enumerate(self.norms):
            here = (before == i).nonzero()[:, 0]
            x = norm(stream[here])
            routing, best = self.gate(i, x)
            stream = (stream.index_copy(0, here, x) if i else stream).index_add(0, here, experts(x, routing))
            before[here] = best + 1
        return stream - hidden, routing


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_how_the_authors_program_differs_from_their_paper(mode):
    x, layer = REFERENCE["s_hidden"], stratified()
    assert not close(x + getattr(layer, mode)()(x), REFERENCE[f"s_{mode}_as_is"])
    layer.router.__class__ = PostNorm
    assert close(x + getattr(layer, mode)()(x), REFERENCE[f"s_{mode}_as_is"])


def test_noisy_top_k_as_tensor2tensor(monkeypatch):
    router = R.NoisyTopK(8, 6, k=2, importance=1.0, load=1.0)
    put(router.weight, REFERENCE["n_gate"])
    put(router.noise, REFERENCE["n_noise"])
    monkeypatch.setattr(torch, "randn_like", lambda x: REFERENCE["n_draw"])
    routing = router(REFERENCE["n_hidden"])
    assert close(dense(routing, 6), REFERENCE["n_gates"])
    assert close(routing.losses["importance"], REFERENCE["n_cv_gates"])
    assert close(routing.losses["load"], REFERENCE["n_cv_load"])
    assert close(dense(router.eval()(REFERENCE["n_hidden"]), 6), REFERENCE["n_eval_gates"])


def test_switch_as_transformers():
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers import modeling_switch_transformers as theirs
    x, mine = torch.randn(1, 60, 8), made(R.Switch, balance=1.0, z=1.0, jitter=0.0, capacity_factor=1.0)
    config = SwitchTransformersConfig(hidden_size=8, d_model=8, num_experts=8, expert_capacity=mine.capacity(60),
                                      router_jitter_noise=0.0)
    router = theirs.SwitchTransformersTop1Router(config)
    put(router.classifier.weight, mine.weight)
    mask, probability, logits = router(x)
    routing = mine(x[0])
    assert routing.info["dropped"] > 0 and close(dense(routing, 8), (mask * probability)[0])
    best = logits.argmax(-1)
    assert close(routing.losses["balance"], theirs.load_balancing_loss_func(logits.softmax(-1), best))
    assert close(routing.losses["z"], theirs.router_z_loss_func(logits))


# ---- brute force

def test_seats_one_by_one():
    rng = np.random.default_rng(0)
    for trial in range(30):
        experts = torch.from_numpy(rng.integers(-1, 4, (7, 3)))
        priority = torch.from_numpy(rng.integers(0, 3, (7, 3))).float() if trial % 2 else None
        turns = [(j, 0 if priority is None else -priority[i, j].item(), i) for j in range(3) for i in range(7)]
        count, want = dict.fromkeys(range(-1, 4), 0), torch.zeros(7, 3, dtype=torch.int64)
        for j, _, i in sorted(turns):
            want[i, j] = count[int(experts[i, j])]
            count[int(experts[i, j])] += 1
        assert torch.equal(R.seats(experts, priority), want)


def test_in_top_k_by_drawing():
    torch.manual_seed(0)
    clean, std = torch.randn(4, 6), torch.rand(4, 6) + 0.3
    noisy = clean + torch.randn(4, 6) * std
    draws = 40_000
    for i in range(6):
        again = noisy.repeat(draws, 1, 1)
        again[..., i] = clean[:, i] + torch.randn(draws, 4) * std[:, i]
        share = (again.topk(2, -1).indices == i).any(-1).float().mean(0)
        assert torch.allclose(R.in_top_k(clean, noisy, std, 2)[:, i], share, atol=4 * 0.5 / draws ** 0.5)


def test_reach_one_by_one():
    torch.manual_seed(0)
    probs = torch.randn(50, 9).softmax(-1)
    for t in (0.05, 0.4, 0.9, 1.0):
        chosen, weights = R.reach(probs, t)
        for p, c, w in zip(probs, chosen, weights, strict=True):
            total, want = 0.0, []
            for i in p.argsort(descending=True).tolist():
                if total < t - 1e-6 or not want: want.append(i)
                total += p[i].item()
            assert c[c >= 0].tolist() == want and torch.equal(w[c >= 0], p[want]) and not w[c < 0].any()


def test_expert_choice_one_by_one():
    router, x = made(R.ExpertChoice), torch.randn(20, 8)
    probs, got = (x @ router.weight.T).softmax(-1), dense(router(x), 8)
    for i in range(8):
        best = probs[:, i].argsort(descending=True)[:5]                       # 20 tokens * 2 / 8
        assert set(got[:, i].nonzero()[:, 0].tolist()) == set(best.tolist())
        assert torch.allclose(got[best, i], probs[best, i])


def test_hash_tables():
    counts = 1000 / np.arange(1, 301)
    even, random = R.hash_table(300, 8, 0, counts).numpy(), R.hash_table(300, 8).numpy()
    load = [np.bincount(t, counts, 8) for t in (even, random)]
    assert load[0].max() / load[0].mean() < load[1].max() / load[1].mean()
    order, filled = np.argsort(-counts, kind="stable"), np.zeros(8)
    for token in order:
        assert filled[even[token]] == filled.min()
        filled[even[token]] += counts[token]
    assert np.array_equal(random, R.hash_table(300, 8).numpy()) and not np.array_equal(random, R.hash_table(300, 8, 1))


def test_hmoe_widths():
    assert R.hmoe_widths(32768) == [2304, 2816, 3328, 3840, 4352, 4864, 5376, 5888]    # the paper's 3B model
    assert R.hmoe_widths(255, kind="geometric") == [1, 2, 4, 8, 16, 32, 64, 128]
    assert R.hmoe_widths(16, kind="hybrid") == [1, 1, 1, 1, 2, 2, 4, 4]
    for kind, n, total in product(("arithmetic", "geometric", "hybrid"), (2, 3, 6, 8), (1000, 1001)):
        widths = R.hmoe_widths(total, n, kind)
        assert sum(widths) == total and widths == sorted(widths) and len(widths) == n


def test_random_is_even_and_repeatable():
    router, x = R.RandomRouting(4, 8, k=3), torch.zeros(20_000, 4)
    first = router(x).experts
    assert (first.sort(1).values.diff(dim=1) > 0).all()                        # three different ones
    expected = 20_000 * 3 / 8
    assert ((loads(first, 8) - expected).abs() < 5 * expected ** 0.5).all()
    second = router(x).experts                                                 # the next step
    assert 0.3 < (first == second).float().mean() * 8 / 2 < 0.7
    assert torch.equal(first, R.RandomRouting(4, 8, k=3)(x).experts)
    assert not torch.equal(first, R.RandomRouting(4, 8, k=3, seed=1)(x).experts)
    assert not torch.equal(first, R.RandomRouting(4, 8, 1, k=3)(x).experts)


# ---- invariants, each with a planted fault that it must find

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def over_capacity(router):
    "An expert serves more tokens than it has seats."
    return bool((loads(router(X).experts, 8) > router.capacity(len(X))).any())


def weights_off(router, want):
    "The weights of a token do not sum to what they should."
    return not torch.allclose(router(X).weights.sum(1), want(router, X))


def noisy_in_evaluation(router):
    "Two evaluation passes differ."
    router.eval()
    return not torch.equal(router(X).weights, router(X).weights)


def uneven_is_best(loss):
    "Some uneven assignment of 6 tokens to 3 experts, with scores that agree with it, costs no more than an even one."
    costs = {}
    for where in product(range(3), repeat=6):
        chosen = torch.tensor(where)
        probs = nn.functional.one_hot(chosen, 3).float() * 0.97 + 0.01
        costs.setdefault(tuple(sorted(chosen.bincount(minlength=3).tolist())), []).append(loss(probs, chosen[:, None]))
    even = max(costs.pop((2, 2, 2)))
    return bool(min(min(c) for c in costs.values()) <= even + 1e-6)


def uneven_load(router): return len(set(loads(router(X).experts, 8).tolist())) > 1


class NoSeats(R.Switch):
    def route(self, hidden, experts, context):
        probs = self.logits(hidden).softmax(-1)
        return Routing(probs.argmax(-1, keepdim=True), probs.amax(-1, keepdim=True), probs)


class FullWeight(R.Switch):
    def route(self, hidden, experts, context):
        routing = super().route(hidden, experts, context)
        return replace(routing, weights=(routing.experts >= 0).float())


class AlwaysNoisy(R.NoisyTopK):
    def route(self, hidden, experts, context): return super().route(hidden + 0.1 * torch.randn(hidden.shape), experts,
                                                                    context)


class TokenChoice(R.ExpertChoice):
    def route(self, hidden, experts, context):
        probs = self.logits(hidden).softmax(-1)
        return Routing(*probs.topk(2, -1)[::-1], probs)


def best_probability(router, x):
    kept = router(x).experts[:, 0] >= 0
    return (x @ router.weight.T).softmax(-1).amax(-1) * kept


def ones(router, x): return torch.ones(len(x))


def constant(probs, experts): return probs.sum() * 0 + 1


@pytest.mark.parametrize("check, good, bad", [
    (over_capacity, lambda: made(R.Switch, jitter=0.0), lambda: made(NoSeats)),
    (over_capacity, lambda: made(R.XMoE, capacity_factor=1.0), lambda: made(NoSeats)),
    (uneven_load, lambda: made(R.ExpertChoice), lambda: made(TokenChoice)),
    (noisy_in_evaluation, lambda: made(R.NoisyTopK), lambda: made(AlwaysNoisy)),
    (noisy_in_evaluation, lambda: made(R.Switch), lambda: made(AlwaysNoisy)),
    (uneven_is_best, lambda: balance_loss, lambda: constant),
    (uneven_is_best, lambda: lambda p, c: R.parameter_penalty(p, c, [5, 5, 5]), lambda: constant),
    (uneven_is_best, lambda: lambda p, c: cv_squared(p.sum(0)),
     lambda: lambda p, c: R.parameter_penalty(p, c, [1, 5, 9]))])
def test_invariants_and_faults(check, good, bad):
    assert not check(good()) and check(bad())


@pytest.mark.parametrize("cls, options, want", [
    (R.Switch, {"jitter": 0.0}, best_probability), (R.NoisyTopK, {}, ones), (R.RMoE, {}, ones),
    (R.RandomRouting, {}, ones), (R.HMoE, {"widths": (4,) * 8}, lambda r, x: r(x).scores.topk(2, -1).values.sum(1)),
    (R.XMoE, {"threshold": 1.0}, ones)])
def test_weights_sum_to_what_the_paper_says(cls, options, want):
    assert not weights_off(made(cls, **options), want)
    assert weights_off(made(FullWeight, jitter=0.0), best_probability)


def test_stratified_weights_sum_to_one_at_every_gate_or_the_token_lost_both():
    layer = stratified()
    layer(REFERENCE["s_hidden"])
    per_gate = layer.routing.weights.view(-1, 3, 2).sum(-1)
    assert (((per_gate - 1).abs() < 1e-5) | (per_gate == 0)).all()
    here = (layer.routing.experts.view(-1, 3, 2) >= 0).any(-1)
    assert torch.equal(here, per_gate > 0) and (here.sum(1) <= layer.routing.info["passes"]).all()
    assert (layer.routing.experts[:, 2:4] != 0).all() and (layer.routing.experts[:, 2:4] != 1).all()  # never back


def test_penalty_prefers_small_experts():
    logits = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.SGD([logits], 1.0)
    for _ in range(50):
        probs = logits.softmax(-1).repeat(30, 1)
        loss = R.parameter_penalty(probs, torch.arange(3).repeat(10)[:, None], [2, 4, 8])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert logits[0] > logits[1] > logits[2]
    assert torch.isclose(R.parameter_penalty(probs, torch.arange(3).repeat(10)[:, None], [4, 4, 4]),
                         balance_loss(probs, torch.arange(3).repeat(10)[:, None]))


def test_entropy_opens_fewer_experts():
    router = made(R.HMoE, widths=(4,) * 8, top_p=0.6, penalty=0.0)
    before = (router(X).experts >= 0).sum()
    optimiser = torch.optim.SGD(router.parameters(), 1.0)
    for _ in range(20):
        optimiser.zero_grad()
        router(X).losses["entropy"].backward()
        optimiser.step()
    assert (router(X).experts >= 0).sum() < before


# ---- gradients

def test_switch_gradient_only_through_the_chosen_probability():
    router = made(R.Switch, jitter=0.0, balance=0.0)
    layer, c = MoELayer(router, Experts(8, 8, 6, std=0.5)), torch.randn(64, 8)
    (layer(X) * c).sum().backward()
    routing = layer.routing
    gain = (layer.experts(X, replace(routing, weights=(routing.experts >= 0).float())) * c).sum(1).detach()
    weight = router.weight.detach().clone().requires_grad_()
    ((X @ weight.T).softmax(-1).gather(1, routing.experts.clamp(min=0))[:, 0] * gain).sum().backward()
    assert torch.allclose(router.weight.grad, weight.grad, atol=1e-5) and weight.grad.any()
    weight = router.weight.detach().clone().requires_grad_()
    frozen = replace(routing, weights=routing.weights.detach())
    assert not (layer.experts(X, frozen) * c).sum().requires_grad or weight.grad is None


def test_hash_and_chance_have_no_parameters():
    for cls in (R.HashRouting, R.RandomRouting): assert not list(made(cls).parameters())


def test_load_loss_reaches_both_matrices_and_a_count_would_not():
    router = made(R.NoisyTopK, k=2, importance=0.0, load=1.0)
    router(X).losses["load"].backward()
    assert router.weight.grad.any() and router.noise.grad.any()
    assert not router.eval()(X).losses["load"].requires_grad


@pytest.mark.parametrize("detach", [False, True])
def test_recurrent_gradient(detach):
    first, second, _ = rmoe_layers(detach)
    shared = Context(rows=(1, 12))
    first(REFERENCE["r_hidden"], context=shared)
    second(REFERENCE["r_hidden"], context=shared)
    second.routing.losses["balance"].backward()
    assert (first.router.proj.grad is not None and bool(first.router.proj.grad.any())) != detach
    assert first.router.cell.weight_ih.grad.any() and first.router.weight.grad is None


def test_rmoe_remembers_its_own_token():
    first, second, _ = rmoe_layers()
    x, shared, other = REFERENCE["r_hidden"], Context(rows=(1, 12)), REFERENCE["r_hidden"].clone()
    other[3] += 1
    for start in (x, other):
        first(start, context=shared)
        second(x, context=shared)
        if start is x: before = second.routing.scores
    assert (before != second.routing.scores).any(1).nonzero()[:, 0].tolist() == [3]


# ---- padding

@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_padding_changes_nothing(cls):
    options = {"capacity_factor": 1.0} if cls in (R.Switch, R.XMoE, R.ExpertChoice, R.Stratified) else {}
    if cls is R.Switch: options["jitter"] = 0.0
    layer, x = MoELayer(made(cls, **options), Experts(8, 8, 6, std=0.5)), torch.randn(3, 9, 8)
    mask, ids = torch.zeros(3, 9, dtype=torch.bool), torch.arange(27).view(3, 9)
    mask[:, :5] = True
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(3, 9, 8, generator=draw)
    padded = Context(ids=ids.reshape(-1), rows=(3, 9))
    short = Context(ids=ids[:, :5].reshape(-1), rows=(3, 5))
    if cls is R.NoisyTopK: layer.eval()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    with_padding, losses = layer(x, mask, padded), layer.routing.losses
    layer.load_state_dict(state)
    alone = layer(x[:, :5], context=short)
    assert torch.allclose(with_padding[:, :5], alone, atol=1e-6) and not with_padding[:, 5:].any()
    assert all(torch.allclose(losses[k], v) for k, v in layer.routing.losses.items())
    layer.load_state_dict(state)
    again = layer(torch.where(mask[..., None], x, noise), mask, padded)
    assert torch.allclose(again[:, :5], alone, atol=1e-6)


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_few_tokens_all_of_them_padding_and_half_precision(cls, n):
    layer, given = MoELayer(made(cls), Experts(8, 8, 6)), context(1, n)
    for mask in (None, torch.zeros(n, dtype=torch.bool)):
        assert layer(torch.randn(n, 8), mask, given).shape == (n, 8)
        assert all(x.isfinite() for x in layer.routing.losses.values())
    assert layer.bfloat16()(torch.randn(n, 8).bfloat16(), context=given).dtype == torch.bfloat16


# ---- the language model

@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_trains_in_a_language_model(cls):
    torch.manual_seed(0)
    options = {"expert_width": R.hmoe_widths(128)} if cls is R.HMoE else {"expert_width": 16}
    model = moe_lm(50, router=cls, width=16, heads=2, block=16, router_options={"state": 8} if cls is R.RMoE else None,
                   **options)
    ids = torch.randint(50, (4, 16))
    out = model(ids)
    loss = nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, 50), ids[:, 1:].reshape(-1)) + out.aux_loss
    loss.backward()
    reached = [p.grad is not None and p.grad.isfinite().all() for layer in model.layers
               for p in layer.router.parameters()]
    assert loss.isfinite() and all(reached)
    for layer in model.layers: assert layer.router.active(layer.experts) > 0


# ---- bad input

@pytest.mark.parametrize("make, name", [
    (lambda: R.NoisyTopK(8, 4, k=5), "k"), (lambda: R.HMoE(8, 4, k=0), "k"), (lambda: R.RMoE(8, 4, k=5), "k"),
    (lambda: R.Stratified(8, 8, strata=(6, 2), k=3), "k"), (lambda: R.RandomRouting(8, 2, k=3), "k"),
    (lambda: R.Switch(8, 4, capacity_factor=0), "capacity_factor"),
    (lambda: R.Switch(8, 4, eval_capacity_factor=-1.0), "eval_capacity_factor"),
    (lambda: R.XMoE(8, 4, capacity_factor=float("nan")), "capacity_factor"),
    (lambda: R.ExpertChoice(8, 4, capacity_factor=-2), "capacity_factor"),
    (lambda: R.Stratified(8, 4, capacity_factor=0.0), "capacity_factor"),
    (lambda: R.XMoE(8, 4, threshold=0.0), "threshold"), (lambda: R.XMoE(8, 4, threshold=1.5), "threshold"),
    (lambda: R.HMoE(8, 4, top_p=0), "top_p"), (lambda: R.HMoE(8, 4)(torch.randn(3, 8)), "widths"),
    (lambda: R.HMoE(8, 4, widths=[1, 2])(torch.randn(3, 8)), "widths"),
    (lambda: R.hmoe_widths(100, 8, "fibonacci"), "kind"), (lambda: R.hmoe_widths(20, kind="geometric"), "total"),
    (lambda: R.hmoe_widths(20, 1), "n_experts"),
    (lambda: R.Stratified(8, 8, strata=3), "strata"), (lambda: R.Stratified(8, 8, strata=(4, 5)), "strata"),
    (lambda: R.Stratified(8, 8, strata=0), "strata"),
    (lambda: made(R.HashRouting)(torch.randn(3, 8)), "ids"),
    (lambda: made(R.HashRouting)(torch.randn(3, 8), Context(ids=torch.tensor([0, 1, 50]))), "ids"),
    (lambda: made(R.HashRouting)(torch.randn(3, 8), Context(ids=torch.tensor([0, 1]))), "ids"),
    (lambda: R.hash_table(5, 2, counts=[1, 2]), "counts"), (lambda: R.hash_table(2, 2, counts=[1, -2]), "counts"),
    (lambda: R.RMoE(8, 4, 1)(torch.randn(3, 8)), "context"),
    (lambda: R.XMoE(8, 4).active(Experts(8, 4, 3)), "active")])
def test_bad_input_is_named(make, name):
    with pytest.raises(ValueError, match=f"`{name}`"): make()


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_nan_is_refused(cls):
    router, x = made(cls, **({"widths": (4,) * 8} if cls is R.HMoE else {})), torch.randn(5, 8)
    x[2, 1] = float("nan")
    with pytest.raises(ValueError, match="`hidden`"): router(x, context=context(1, 5))
    with pytest.raises(ValueError, match="`hidden`"): MoELayer(router, Experts(8, 8, 6))(x, context=context(1, 5))
