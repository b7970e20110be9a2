"""The MoE layer with every registered router, in training, in the cache and at odd shapes."""
import copy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import selectbench.nn.competition
import selectbench.nn.routers  # noqa: F401 (they register)
from selectbench.core.registry import methods
from selectbench.nn import moe
from selectbench.nn.moe import (Context, Dense, Experts, MoELayer, Router, Routing, TopK, active_flops, balance_loss,
                                find, loads, moe_config, moe_lm, without)
from selectbench.zoo.lm import train_lm

TEXTS = [f"the {a} {b} sees the {b} {a}" for a in ("red", "old", "new", "wet") for b in ("cat", "dog", "owl", "fox")]
ROUTERS = [c["name"] for c in methods.cards() if c["family"] == "moe" and c["kind"] == "architecture"]
NEEDS = {"hmoe": {"expert_width": [4, 6, 10, 12]}, "competesmoe": {"router_options": {"steps": 10}}}
SMALL = dict(width=16, heads=2, layers=2, n_experts=4, expert_width=8, k=2, block=32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path))


def random_routing(n, e, a, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randint(-1, e, (n, a), generator=g)
    weights = torch.rand(n, a, generator=g, dtype=dtype).masked_fill(chosen < 0, 0)
    return Routing(chosen, weights.requires_grad_())


def by_masks(experts, hidden, routing):
    "The loop over experts with boolean masks, through autograd alone."
    out = torch.zeros_like(hidden)
    for i in range(experts.n_experts):
        for j in range(routing.experts.shape[1]):
            m = routing.experts[:, j] == i
            gate, up, down = experts.weights(i)
            y = F.linear(F.silu(F.linear(hidden[m], gate)) * F.linear(hidden[m], up), down)
            out = out.index_put((torch.where(m)[0],), routing.weights[m, j, None] * y, accumulate=True)
    return out


@pytest.mark.parametrize("n, widths, a", [(300, [16] * 16, 2), (300, [5, 40, 1, 17], 3), (1, [7], 1), (0, [7, 7], 2),
                                          (50, [9] * 64, 4), (20, [4, 4], 0)])
def test_equals_the_plain_loop_in_double_precision(n, widths, a):
    torch.manual_seed(n)
    experts = Experts(24, widths=widths, std=0.5).double()
    hidden = torch.randn(n, 24, dtype=torch.float64, requires_grad=True)
    routing, grad = random_routing(n, len(widths), a, n), torch.randn(n, 24, dtype=torch.float64)
    leaves = (hidden, routing.weights, *experts.parameters())
    found = []
    for run in (experts, partial(by_masks, experts)):
        out = run(hidden, routing)
        if not out.requires_grad: out = out + 0 * sum(x.sum() for x in leaves)
        found.append([out, *torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10, rtol=1e-10)
    nobody = (routing.experts < 0).all(1)
    assert not found[0][0][nobody].any()


def test_experts_that_serve_nobody_get_zero_gradients():
    experts = Experts(6, 5, 3)
    chosen = torch.tensor([[1, 3], [3, 1]])
    experts(torch.randn(2, 6), Routing(chosen, torch.ones(2, 2))).sum().backward()
    rows = experts.w_in.grad.view(5, 6, 6), experts.w_out.grad.view(5, 3, 6)
    assert all(not g[[0, 2, 4]].any() and g[[1, 3]].flatten(1).any(1).all() for g in rows)


def test_without_gradients_nothing_is_kept_and_the_output_is_the_same():
    layer = MoELayer(TopK(8, 4, k=2), Experts(8, 4, 6))
    x = torch.randn(3, 5, 8)
    with torch.no_grad(): y = layer(x)
    assert not y.requires_grad and torch.equal(y, layer(x).detach())
    assert layer(x.half().float()).dtype == torch.float32


def test_second_derivatives_are_refused():
    experts, x = Experts(6, 2, 3), torch.randn(2, 6, requires_grad=True)
    y = experts(x, Routing(torch.tensor([[0], [1]]), torch.ones(2, 1)))
    with pytest.raises(NotImplementedError, match="second"): torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_fits(name):
    torch.manual_seed(0)
    ids = torch.randint(1, 257, (2, 12))
    model = moe_lm(257, router=name, **SMALL | NEEDS.get(name, {}))
    out = model(ids)
    assert out.logits.shape == (2, 12, 257) and out.logits.isfinite().all() and out.aux_loss.ndim == 0
    (F.cross_entropy(out.logits.flatten(0, 1), ids.flatten()) + out.aux_loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.layers[0].experts.w_in.grad.any()
    assert active_flops(model) > 0
    assert all(layer.context is None for layer in model.layers)


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_changes_nothing_for_the_rest(name):
    torch.manual_seed(0)
    model = moe_lm(257, router=name, **SMALL | NEEDS.get(name, {})).eval()
    ids, mask = torch.randint(1, 257, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    other = torch.where(mask.bool(), ids, 5)
    with torch.no_grad(): a, b = model(ids, mask), model(other, mask)
    kept = mask.bool()
    assert torch.allclose(a.logits[kept], b.logits[kept], atol=1e-5)
    assert torch.allclose(a.aux_loss, b.aux_loss, atol=1e-6)
    served = model.layers[0].routing.experts
    if len(served) == 24: assert (served[~kept.flatten()] == -1).all()


def test_an_edited_router_is_trained_anew_and_the_same_one_is_not(monkeypatch):
    train = partial(train_lm, texts=TEXTS, tokens=300, batch_size=2, block=16)
    first = train(moe_config(TopK, **SMALL))
    assert first.curve.seconds.iloc[-1] == train(moe_config("top_k", **SMALL)).curve.seconds.iloc[-1]   # from the cache
    assert moe_config("top_k", **SMALL).keywords == moe_config(TopK, **SMALL).keywords
    other = train(moe_config(partial(TopK, balance=0.5), **SMALL))
    assert other.fingerprint != first.fingerprint
    before = moe_config(TopK).keywords["source"]
    monkeypatch.setattr(moe, "balance_loss", lambda probs, experts, mask=None: probs.sum() * 0)
    assert moe_config(TopK).keywords["source"] != before


def test_a_trained_model_comes_back_with_its_step_count():
    run = train_lm(moe_config("top_k", **SMALL, shared_width=4), TEXTS, 300, batch_size=2, block=16)
    model = run.model()
    steps = [int(layer.router.step) for layer in model.layers]
    assert steps == [len(run.curve)] * 2
    clone = copy.deepcopy(model)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, clone(ids).logits) and run.losses(TEXTS[:2]).shape == (2,)
    assert clone.layers[0] is not model.layers[0]


def test_dense_costs_what_the_mixture_costs():
    shape = SMALL | {"shared_width": 6}
    mixture, dense = moe_lm(257, **shape), moe_lm(257, router=None, **shape)
    routers = sum(p.numel() for layer in mixture.layers for p in layer.router.parameters())
    assert active_flops(mixture) - active_flops(dense) == 2 * routers and not dense.layers
    train_lm(moe_config(None, **shape), TEXTS, 100, batch_size=2, block=16)


def test_the_context_reaches_every_layer():
    seen = []

    class Looks(Router):
        def route(self, hidden, experts, context):
            seen.append((context.ids, context.rows, context.step, context.state.setdefault("layers", [])))
            context.state["layers"].append(self.layer)
            n = len(hidden)
            return Routing(torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1), losses={"one": torch.tensor(0.25)})

    model, ids = moe_lm(257, router=Looks, **SMALL), torch.randint(0, 257, (3, 5))
    assert model(ids).aux_loss == 0.5 and model(ids).aux_loss == 0.5
    assert [s[2] for s in seen] == [0, 0, 1, 1] and seen[0][3] == [0, 1] and seen[0][3] is not seen[2][3]
    assert all(torch.equal(s[0], ids.flatten()) and s[1] == (3, 5) for s in seen)


def test_a_function_is_a_router_and_run_is_called_where_it_is():
    def first(hidden, *, experts, context):
        return Routing(torch.zeros(len(hidden), 1, dtype=torch.int64), torch.ones(len(hidden), 1))

    class Doubles(Router):
        def run(self, hidden, experts, context):
            self.begin(hidden, context)
            return 2 * hidden, Routing(torch.zeros(len(hidden), 1, dtype=torch.int64), torch.ones(len(hidden), 1))

    x, experts = torch.randn(4, 6), Experts(6, 2, 3)
    assert torch.allclose(MoELayer(first, experts)(x), experts.expert(0, x), atol=1e-6)
    layer = MoELayer(Doubles(6, 2), experts, Dense(6, 3))
    assert torch.allclose(layer(x), 2 * x + layer.shared(x)) and int(layer.router.step) == 1
    with pytest.raises(ValueError, match="`hidden`"): layer(torch.full((2, 6), torch.inf))


def test_masks_and_loads():
    routing = Routing(torch.tensor([[0, 1], [2, 1]]), torch.ones(2, 2))
    assert without(routing, torch.tensor([True, False])).experts.tolist() == [[-1, -1], [2, 1]]
    assert without(routing, torch.tensor([[True, False], [False, False]])).weights.tolist() == [[0, 1], [1, 1]]
    assert loads(routing.experts, 4, torch.tensor([False, True])).tolist() == [0, 1, 1, 0]
    nobody = torch.zeros(2, dtype=torch.bool)
    assert balance_loss(torch.rand(2, 4), routing.experts, nobody) == 0
    layer = MoELayer(TopK(6, 3), Experts(6, 3, 2))
    assert not layer(torch.randn(2, 6), nobody).any() and not layer.routing.losses["balance"].any()
    assert layer(torch.randn(0, 6)).shape == (0, 6) and layer(torch.randn(2, 0, 6)).shape == (2, 0, 6)
    context = Context(rows=(1, 2))
    layer(torch.randn(1, 2, 6), torch.ones(1, 2, dtype=torch.bool), context)
    assert context.mask is None     # what was given is left as it was


@pytest.mark.parametrize("word, wrong", [
    ("`experts`", Routing(torch.zeros(2, 1), torch.ones(2, 1))),
    ("`experts`", Routing(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 2))),
    ("`experts`", Routing(torch.zeros(2, dtype=torch.int64), torch.ones(2))),
    ("`experts`", Routing(torch.full((2, 1), 3), torch.ones(2, 1)))])
def test_a_wrong_routing_is_refused(word, wrong):
    with pytest.raises(ValueError, match=word): Experts(6, 3, 2)(torch.randn(2, 6), wrong)


def test_names_of_routers():
    assert find("top_k") is TopK and find("selectbench.nn.moe:TopK") is TopK and find(TopK) is TopK
    with pytest.raises(ValueError, match="`router`"): find("selectbench.nn.nowhere:TopK")
    with pytest.raises(KeyError): find("top_kk")
    with pytest.raises(ValueError, match="`router`"): moe_config(partial(TopK, 8))
    with pytest.raises(ValueError, match="differ"): getattr(Experts(6, widths=[1, 2]), "gate")  # noqa: B009


def test_the_benchmark_runs():
    script = Path(__file__).parents[1] / "benchmarks/moe.py"
    command = [sys.executable, str(script), "--tokens", "64", "--rounds", "1", "--widths", "8", "--threads", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "loop with masks" in said and "log-log slope" in said
