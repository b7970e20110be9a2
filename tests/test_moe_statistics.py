"Statistics of experts: nulls that hold their level, planted experts, counts in pieces, experts silenced, bad input."
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from selectbench import methods
from selectbench.core.conformance import check_method
from selectbench.moe.statistics import (
    RouterCounts,
    ablated,
    coactivation,
    domain_specialisation,
    evenness,
    expert_load,
    gate_similarity,
    independent_pairs,
    information,
    load_balance,
    moe_taxonomy,
    norm_agreement,
    norm_ranks,
    output_similarity,
    routing_taxonomy,
    super_experts,
    token_specialisation,
    weight_similarity,
)
from selectbench.nn.moe import moe_lm
from selectbench.nn.trace import RouterTrace, expert_output, trace

NAMES = ("expert_load", "load_balance", "coactivation", "domain_specialisation", "token_specialisation", "norm_ranks",
         "norm_agreement", "weight_similarity", "gate_similarity", "output_similarity", "super_experts",
         "moe_taxonomy", "routing_taxonomy")


@pytest.mark.parametrize("name", NAMES)
def test_conforms(name): check_method(name)


# Information and its nulls


def uniform(p, draws):
    "The p-value of p-values with `draws` draws each being uniform."
    return stats.kstest(np.array(p) - 0.5 / (draws + 1), "uniform").pvalue


def test_p_of_domains_is_uniform_and_carries_the_bias():
    "Documents with tastes of their own and of different lengths, domains that mean nothing; every expert's p too."
    frames = []
    for s in range(250):
        rng = np.random.default_rng([3, s])
        length = rng.integers(5, 200, 30)
        taste = rng.dirichlet(np.full(4, 2), 30)
        counts = np.stack([rng.multinomial(n, p) for n, p in zip(length, taste, strict=True)])
        frames.append(domain_specialisation(counts, rng.permutation(30) % 3, draws=99, seed=s))
    for row in range(5): assert uniform([f.p[row] for f in frames], 99) > 0.005
    excess = np.array([f.excess[0] for f in frames])
    assert min(f.bits[0] for f in frames) > 0 and abs(excess.mean()) < 3 * excess.std() / len(excess)**0.5


def test_p_of_tables_is_uniform_with_one_expert_per_token():
    p = [token_specialisation(np.random.default_rng([4, s]).multinomial(300, np.full(20, 0.05)).reshape(5, 4), draws=99,
                              seed=s).p[0] for s in range(250)]
    assert uniform(p, 99) > 0.005


def test_domain_null_is_all_permutations():
    "Six documents: the draws have the mean, the 95 % point and the p of the 720 permutations, counted one by one."
    rng = np.random.default_rng(5)
    counts, domain = rng.poisson(6, (6, 3)), np.array([0, 0, 0, 1, 1, 2])
    member = lambda d: np.eye(3)[d].T
    every = np.array([information(member(domain[list(o)]) @ counts)[0] for o in permutations(range(6))])
    row = domain_specialisation(counts, domain, draws=4000).iloc[0]
    assert np.isclose(row.null_mean, every.mean(), rtol=0.03)
    assert abs(row.p - (every >= row.bits - 1e-12).mean()) < 0.03


def test_table_null_is_fishers():
    "Two by two: p is the hypergeometric probability of a table that tells as much."
    table = np.array([[9, 3], [4, 8]])
    law = stats.hypergeom(24, 12, 13)
    bits = lambda a: information(np.array([[a, 12 - a], [13 - a, a - 1]]))[0]
    exact = sum(law.pmf(a) for a in range(1, 13) if bits(a) >= bits(9) - 1e-12)
    assert abs(token_specialisation(table, draws=6000).p[0] - exact) < 0.02


def test_planted_domain_expert():
    "Expert 1 serves the second domain only; it is found, and its bits are those of that domain's share."
    rng = np.random.default_rng(6)
    counts, domain = rng.multinomial(100, [0.25] * 4, 40), np.arange(40) % 4
    counts[domain != 1, 1] = 0
    frame = domain_specialisation(counts, domain, draws=199).set_index("expert")
    share = counts[domain == 1].sum() / counts.sum()
    assert np.isclose(frame.bits[1], -np.log2(share)) and frame.p[1] == frame.p["all"] == 1 / 200
    assert frame.bits.idxmax() == 1
    whole = counts.sum(0) / counts.sum() @ frame.bits.drop("all").to_numpy(dtype=float)
    assert np.isclose(frame.bits["all"], whole)


def test_information_ignores_names_and_order():
    rng = np.random.default_rng(7)
    counts, domain = rng.poisson(5, (20, 4)), np.arange(20) % 3
    order = rng.permutation(20)
    a = domain_specialisation(counts, domain, draws=9).bits
    assert np.allclose(a, domain_specialisation(counts[order], 7 * domain[order] + 2, draws=9).bits)
    assert information(counts)[0] <= min(np.log2(4), np.log2(20))
    empty = np.c_[counts, np.zeros(20, int)]  # an expert that is never used says nothing and disturbs nobody
    more = token_specialisation(empty, draws=9)
    assert np.isclose(more.bits[0], token_specialisation(counts, draws=9).bits[0]) and more.p.iloc[-1] == 1


# Pairs and load


@pytest.mark.parametrize("k", [2, 3, 5])
def test_lift_is_one_when_partners_are_independent(k):
    rng = np.random.default_rng(8)
    even = rng.permuted(np.tile(np.arange(7), (20_000, 1)), axis=1)[:, :k]
    assert abs(coactivation(even).lift - 1).max() < 0.08


def test_planted_couple():
    "Experts 0 and 1 always come together; the rest are independent of them."
    rng = np.random.default_rng(9)
    rest = 2 + rng.permuted(np.tile(np.arange(4), (4000, 1)), axis=1)[:, :2]
    rest[:1500] = [0, 1]
    frame = coactivation(rest).set_index(["expert", "other"])
    assert frame.lift.idxmax() == (0, 1) and frame.observed[0, 1] == 1500 and (frame.lift[0, 2] == 0)


def test_expected_pairs_keep_the_sums():
    rng = np.random.default_rng(10)
    pairs = rng.poisson(30, (9, 9)); pairs = np.triu(pairs, 1) + np.triu(pairs, 1).T
    pairs[4] = pairs[:, 4] = 0
    fit = independent_pairs(pairs)
    assert np.allclose(fit.sum(1), pairs.sum(1)) and np.allclose(fit, fit.T) and (fit.diagonal() == 0).all()
    i, j, k, m = 0, 1, 2, 3  # a product off the diagonal: cross ratios of four experts are one
    assert np.isclose(fit[i, j] * fit[k, m], fit[i, k] * fit[j, m])


def test_load_of_an_idle_expert():
    experts = np.array([[0, -1], [0, 2], [-1, -1]])
    frame = expert_load(experts, np.array([[1.0, 0], [0.5, 0.5], [0, 0]]), n_experts=4)
    assert frame.tokens.tolist() == [2, 0, 1, 0] and np.allclose(frame.weight, [0.75, 0, 0.25, 0])
    line = load_balance(experts, n_experts=4).iloc[0]
    assert line.unused == 2 and np.isclose(line.dropped, 1 / 3) and np.isclose(line.unfilled, 0.5)
    assert np.isclose(load_balance(np.arange(8)[:, None]).relative_entropy[0], 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=9).filter(any))
def test_evenness_by_hand(load):
    "Every number by its definition, whatever the unit of the load; one expert alone is even."
    share, e = [x / sum(load) for x in load], len(load)
    bits = -sum(x * np.log2(x) for x in share if x)
    want = {"entropy": bits, "relative_entropy": bits / np.log2(e), "max_over_mean": e * max(share),
            "cv": np.std(load) / np.mean(load)}
    for found in (evenness(load), evenness(np.array(load) * 0.5)):
        assert found.keys() == want.keys() and all(np.isclose(found[name], want[name]) for name in want)
    assert evenness([3]) == {"entropy": 0, "relative_entropy": 1, "max_over_mean": 1, "cv": 0}


# Counts in pieces


def own_model():
    "A model of the package's own layers, and ids."
    torch.manual_seed(0)
    return moe_lm(50, layers=2, width=16, expert_width=8, n_experts=5, heads=2).eval(), torch.randint(50, (8, 12))


def test_counts_add_up_whatever_the_pieces():
    model, ids = own_model()
    documents = torch.arange(8)[:, None] * 2 + (torch.arange(12) >= 6)  # two documents a row
    whole = RouterCounts().update(trace(model, ids), ids, documents.numpy())
    part = lambda r: RouterCounts().update(trace(model, ids[r]), ids[r], documents[r].numpy())
    total = part([6, 7]) + part([0]) + part(range(1, 6))
    for name in whole.layers:
        for label in ("token", "position", "document"):
            assert (whole.counts(name, label) == total.counts(name, label)).all()
        assert whole.counts(name, "document").sum(1).tolist() == [12] * 16  # six tokens, two experts each
    pd.testing.assert_frame_equal(whole.balance(), total.balance())
    pd.testing.assert_frame_equal(whole.coactivation(), total.coactivation())
    alone = token_specialisation(whole.counts(name, "token"), draws=19)
    both = whole.specialisation("token", draws=19)
    assert np.allclose(both[both.layer == name].bits, alone.bits) and len(both) == 2 * len(alone)


def test_memory_does_not_grow_with_tokens():
    model, ids = own_model()
    counts = RouterCounts().update(trace(model, ids), ids)
    size = lambda: sum(t.size for x in counts.layers.values() for t in (x.load, x.pairs, *x.tables.values()))
    before = size()
    for _ in range(5): counts.update(trace(model, ids), ids)
    assert size() == before and counts.balance().tokens.tolist() == [6 * 96] * 2


def test_documents_never_seen_do_not_count():
    "A domain of a document without tokens is not among the permuted."
    model, ids = own_model()
    numbers = np.array([0, 1, 2, 3, 9, 10, 11, -1])
    counts = RouterCounts().update(trace(model, ids), ids, numbers)
    groups = np.arange(12) % 2
    frame = counts.specialisation("document", groups, draws=19)
    seen = numbers[:-1]
    name = next(iter(counts.layers))
    alone = domain_specialisation(counts.counts(name, "document")[seen], groups[seen], draws=19)
    pd.testing.assert_frame_equal(frame[frame.layer == name].drop(columns="layer").reset_index(drop=True), alone)


def test_bad_questions_to_counts():
    model, ids = own_model()
    with pytest.raises(ValueError, match="`RouterCounts` is empty"): RouterCounts().load()
    counts = RouterCounts().update(trace(model, ids), ids)
    for match, ask in (("`label`", lambda: counts.counts("?", "colour")),
                       ("`layer`", lambda: counts.counts("?", "token")),
                       ("no `update` was told", lambda: counts.specialisation("document", np.zeros(8, int))),
                       ("`groups`", lambda: counts.specialisation("token", np.zeros(8, int))),
                       ("`groups`", lambda: counts.specialisation("document")),
                       ("`ids`", lambda: RouterCounts().update(trace(model, ids), ids[0])),
                       ("`documents`", lambda: RouterCounts().update(trace(model, ids), ids, np.zeros(3, int)))):
        with pytest.raises(ValueError, match=match): ask()
    told = RouterCounts().update(trace(model, ids), ids, np.arange(8))
    with pytest.raises(ValueError, match="`groups` has 3 entries"): told.specialisation("document", np.zeros(3, int))
    bare = trace(model, ids)
    with pytest.raises(ValueError, match="`trace` has no scores"):
        RouterCounts().update(RouterTrace(bare.layers, {}, bare.experts, bare.weights, {}, bare.positions), ids)


# Silencing


def switch():
    config = SwitchTransformersConfig(vocab_size=40, d_model=16, d_kv=8, d_ff=12, num_layers=2, num_decoder_layers=2,
                                      num_heads=2, num_experts=4, num_sparse_encoder_layers=1, expert_capacity=64,
                                      num_sparse_decoder_layers=1, decoder_start_token_id=0)
    ids = torch.randint(2, 40, (4, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    return SwitchTransformersForConditionalGeneration(config).eval(), batch


def gpt_oss():
    "Experts with biases, which must go too."
    config = GptOssConfig(vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=2, head_dim=8,
                          num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
                          pad_token_id=None, eos_token_id=None)
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad(): [layer.mlp.experts.down_proj_bias.normal_() for layer in model.model.layers]
    return model, {"input_ids": torch.randint(40, (4, 9))}


def own():
    model, ids = own_model()
    return model, {"input_ids": ids}


@pytest.mark.parametrize("make", [switch, gpt_oss, own])
def test_a_silenced_expert_is_missing_from_the_sum(make):
    torch.manual_seed(1)
    model, batch = make()
    seen = trace(model, batch, outputs=True)
    layer = seen.layers[0]
    gone = torch.unique(seen.experts[layer])[:2].tolist()
    terms = sum((seen.weights[layer] * (seen.experts[layer] == e)).sum(1, keepdim=True)
                * expert_output(model, layer, e, seen.inputs[layer]) for e in gone)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with ablated(model, layer, gone) as silent:
        now = trace(silent, batch, outputs=True)
        assert not expert_output(model, layer, gone[0], seen.inputs[layer]).any()
    assert torch.allclose(now.outputs[layer], seen.outputs[layer] - terms, atol=1e-5) and terms.abs().max() > 1e-4
    with pytest.raises(RuntimeError, match="stop"), ablated(model, layer, gone): raise RuntimeError("stop")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_ablated_refuses():
    model, _ = own_model()
    layer = next(name for name, m in model.named_modules() if hasattr(m, "experts"))
    with pytest.raises(ValueError, match="`layer`"), ablated(model, "nowhere", [0]): pass
    for bad in ([5], [-1]):
        with pytest.raises(ValueError, match="`experts`"), ablated(model, layer, bad): pass


# Rankings, similarity, super experts, surveys


def test_chance_of_rankings():
    "Independent scores and norms meet chance, a scale of the scores changes nothing, reversed norms are the worst."
    rng = np.random.default_rng(11)
    scores, norms = rng.normal(size=(4000, 6)), rng.gamma(2, size=(4000, 6))
    frame = norm_agreement(scores, norms)
    assert abs(frame.value - frame.chance).max() < 0.03
    assert norm_ranks(3 * scores + 1, norms).equals(norm_ranks(scores, norms))
    assert norm_agreement(scores, np.exp(-scores)).set_index("measure").value["spearman"] == -1
    assert (norm_ranks(scores, norms).groupby("score_rank")["count"].sum() == 4000).all()


def test_similarity_of_one_expert_with_itself_and_its_opposite():
    rng = np.random.default_rng(12)
    gate, up, down = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), rng.normal(size=(4, 5))
    frame = weight_similarity(*(np.stack([x, 2 * x, -x]) for x in (gate, up, down)))
    row = lambda i, j: frame[(frame.expert == i) & (frame.other == j)]
    assert np.allclose(row(0, 1)[["matrix", "averaged", "reordered", "tau"]], 1)
    assert np.allclose(row(0, 2)[["matrix", "averaged"]], -1) and (row(0, 2).reordered > -1).all()
    assert "reordered" not in weight_similarity(*(np.stack([x, x]) for x in (gate, up, down)), reorder=False)


def test_gate_similarity_holds_its_level():
    "Gate vectors that have nothing to do with neurons: p is uniform, r2 is near its chance."
    frames = []
    for s in range(120):
        rng = np.random.default_rng([13, s])
        neurons = [rng.normal(size=(7, 3, 4)), rng.normal(size=(7, 3, 4)), rng.normal(size=(7, 4, 3))]
        frames.append(gate_similarity(rng.normal(size=(7, 4)), *neurons, draws=99, seed=s).iloc[0])
    assert uniform([f.p for f in frames], 99) > 0.005
    assert abs(np.mean([f.r2 - f.chance for f in frames])) < 0.02


def test_gate_null_is_all_permutations():
    "Five experts: chance and p are those of the 120 permutations of the gate vectors."
    rng = np.random.default_rng(15)
    router, (gate, up), down = rng.normal(size=(5, 4)), rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(5, 4, 3))
    at = np.triu_indices(5, 1)
    pairs = lambda x: (x @ x.T / np.outer(*[np.linalg.norm(x, axis=1)] * 2))[at]
    r2 = np.array([stats.pearsonr(pairs(router[list(o)]), pairs(up.mean(1)))[0]**2 for o in permutations(range(5))])
    row = gate_similarity(router, gate, up, down, draws=4000).set_index("projection").loc["up"]
    assert np.isclose(row.r2, r2[0]) and np.isclose(row.chance, r2.mean(), rtol=0.05)
    assert abs(row.p - (r2 >= r2[0] - 1e-12).mean()) < 0.03


def test_outputs_in_pieces():
    "A layer large enough to be cut gives what one expert pair gives by hand."
    x = np.random.default_rng(14).normal(size=(3000, 64, 2)).astype(np.float32)
    frame = output_similarity(x).set_index(["expert", "other"])
    a, b = x[:, 3].astype(float), x[:, 60].astype(float)
    c = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.isclose(frame.cosine[3, 60], c.mean())
    assert np.isclose(frame.angular[3, 60], 1 - np.arccos(c).mean() / np.pi)


def test_super_experts_are_above_both_thresholds():
    peaks = np.ones((8, 100)); peaks[0, :3] = [100, 10, 9.9]; peaks[7, 5] = 1000
    assert super_experts(peaks, percentile=99).expert.tolist() == [0]          # a tenth is not above a tenth
    assert super_experts(peaks, percentile=99, fraction=0.05).expert.tolist() == [0, 1, 2]
    assert super_experts(peaks, layers=[7], percentile=99).layer.tolist() == [7]
    assert len(super_experts(np.ones((4, 4)))) == 0


@pytest.mark.parametrize("match, call", [
    ("`n_experts`", lambda: load_balance(np.array([[3]]), n_experts=3)),
    ("`router_experts`", lambda: coactivation(np.array([[-1, -1]]))),
    ("`expert_counts`", lambda: token_specialisation(np.zeros((3, 2), int))),
    ("`expert_counts`", lambda: domain_specialisation(np.array([[1, -1]]), np.array([0]))),
    ("`draws`", lambda: token_specialisation(np.ones((3, 2), int), draws=0)),
    ("`chosen`", lambda: norm_agreement(np.ones((2, 3)), np.ones((2, 3)), chosen=4)),
    ("`router_scores`", lambda: norm_agreement(np.ones((2, 1)), np.ones((2, 1)))),
    ("`router`", lambda: gate_similarity(np.ones((2, 3)), *(np.ones((2, 4, 3)),) * 2, np.ones((2, 3, 4)))),
    ("`expert_peaks`", lambda: super_experts(-np.ones((2, 3)))),
    ("`percentile`", lambda: super_experts(np.ones((2, 3)), percentile=101)),
    ("`layers`", lambda: super_experts(np.ones((2, 3)), layers=[2]))])
def test_bad_input(match, call):
    with pytest.raises(ValueError, match=match): call()


def test_surveys_place_every_method_of_the_family():
    import selectbench.moe.surgery
    import selectbench.nn.competition
    import selectbench.nn.routers  # noqa: F401 (registers its routers, as the two above)
    cai, fedus = moe_taxonomy().set_index("branch").methods, routing_taxonomy().set_index("routing").methods
    assert cai["not placed"] == fedus["not placed"] == ""
    assert "smear" in cai["soft, expert merging"]
    assert "switch_transformer" in fedus["each token chooses its top-k experts"]
    placed = {n for names in cai for n in names.split(", ") if n}
    family = [c for c in methods.cards() if c["family"] == "moe"]
    assert placed == {c["name"] for c in family if c["kind"] in ("architecture", "method")}
