"""Surgery on experts: Hugging Face models still load and run, what must not change does not, faults are seen."""

from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from selectbench.core.registry import methods
from selectbench.core.selection import Selection
from selectbench.core.study import Study
from selectbench.core.vocabulary import sample_signals
from selectbench.moe import surgery
from selectbench.moe.surgery import (
    COUNTS, ablate_experts, align, calibrate, choose_experts, drop_upcycling, expert_task, layer_signals, load,
    m_smoe, merge_experts, naee, prune_experts, uncurl, upcycle,
)
from selectbench.zoo.lm import build, train_lm
from selectbench.zoo.text_task import held_out_loss, per_byte

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 0,
         "eos_token_id": 0, "num_experts_per_tok": 2, "norm_topk_prob": True}
IDS = torch.tensor(np.random.default_rng(1).integers(0, 50, (2, 12)))
CRITERIA = ("heavy_hitters", "router_mass", "activation_norm", "reap", "naee")


def small(kind, experts=6, **more):
    "A model of `kind` with random weights large enough for experts to differ."
    config = SIZES | {"model_type": kind} | more
    if kind in COUNTS: config[COUNTS[kind]] = experts
    if "qwen" in kind: config |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "head_dim": 8}
    model = build({"config": config}).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.normal_(0, 0.4, generator=draw)
    return model


def change(model, other):
    with torch.no_grad(): return float((model(IDS).logits - other(IDS).logits).abs().max())


@pytest.mark.parametrize("kind", COUNTS)
def test_pruned_and_merged_models_load_from_disk_and_run(kind, tmp_path):
    model = small(kind)
    signals = layer_signals(model, IDS)
    made = {"pruned": prune_experts(model, choose_experts(methods["reap"], signals, 3)),
            "compact": merge_experts(model, choose_experts(m_smoe, signals, 3), compact=True),
            "merged": merge_experts(model, choose_experts(uncurl, signals, 3))}
    for name, cut in made.items():
        cut.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert getattr(again.config, COUNTS[kind]) == (6 if name == "merged" else 3)
        assert change(again, cut) < 1e-5 < 1e-2 < change(again, model)


def test_a_single_expert_is_all_that_is_asked():
    cut = prune_experts(small("mixtral"), dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp"), [4]))
    assert cut.config.num_experts_per_tok == 1
    assert torch.isfinite(cut(IDS).logits).all()


def test_what_comes_as_state_dict_goes_as_state_dict_and_is_not_changed():
    model = small("olmoe")
    before = {n: x.clone() for n, x in model.state_dict().items()}
    pair = model.config, model.state_dict()
    config, state = prune_experts(pair, choose_experts(methods["random"], layer_signals(model, IDS), 2, seed=1))
    assert config.num_experts == 2 and model.config.num_experts == 6
    assert state["model.layers.0.mlp.experts.down_proj"].shape[0] == 2
    assert all(torch.equal(x, before[n]) for n, x in pair[1].items())
    load(config, state)


def test_another_number_of_a_seed_for_each_layer():
    model = small("olmoe")
    chosen = choose_experts(methods["random"], layer_signals(model, IDS), 3, seed=1)
    assert len({tuple(c.index) for c in chosen.values()}) == 2


@pytest.mark.parametrize("name", CRITERIA)
def test_how_experts_are_numbered_does_not_matter(name):
    fn = methods[name]
    signals = sample_signals(fn.card.signals, 4)
    order = np.random.default_rng(1).permutation(14)  # the new expert i is the old order[i]
    new = np.argsort(order)
    by_expert = ("router_scores", "expert_norms", "expert_outputs")
    moved = {s: x[:, order] if s in by_expert else x for s, x in signals.items()}
    moved["router_experts"] = np.where(signals["router_experts"] < 0, -1, new[signals["router_experts"]])
    for k in (1, 5, 14):
        assert np.array_equal(fn(**signals, k=k).index, order[fn(**moved, k=k).index])
    if name == "naee":  # also where it enumerates
        few = sample_signals(fn.card.signals, 4, e=5)
        assert np.allclose(fn(**few, k=2).info["error"], min(_errors(few, 2)))


def _errors(s, k):
    "The error of each set of `k` experts, token by token."
    def gave(kept):
        out = []
        for x in range(len(s["router_scores"])):
            p = np.exp(s["router_scores"][x, kept].astype(float))
            top = np.argsort(-p)[:2]
            weight = p[top] / p[top].sum()
            out.append(weight @ s["expert_outputs"][x, kept][top])
        return np.array(out)
    places = list(enumerate(zip(s["router_experts"], s["router_weights"], strict=True)))
    full = np.array([sum(g * s["expert_outputs"][x, j] for j, g in zip(experts, weights, strict=True) if j >= 0)
                     for x, (experts, weights) in places])
    return [((gave(list(kept)) - full) ** 2).sum() for kept in combinations(range(s["router_scores"].shape[1]), k)]


def test_greedy_is_close_to_enumeration_and_never_below_it():
    for seed in range(5):
        s = sample_signals(naee.card.signals, seed, e=7, n=80)
        best, greedy = naee(**s, k=3).info, naee(**s, k=3, exact_up_to=0).info
        assert best["exact"] and not greedy["exact"]
        assert best["error"] <= greedy["error"] < 1.25 * best["error"]


def test_a_layer_that_loses_nobody_has_no_error():
    found = layer_signals(small("qwen2_moe"), IDS)
    for s in found.values(): assert naee(*(s[n] for n in naee.card.signals), k=6).info["error"] < 1e-6


def test_alignment_finds_the_permutation():
    rng = np.random.default_rng(0)
    one = [rng.normal(size=s) for s in ((9, 4), (9, 4), (4, 9))]
    order = rng.permutation(9)
    other = one[0][order], one[1][order], one[2][:, order]
    assert np.array_equal(order[align(one, other)], np.arange(9))


def test_merging_leaves_a_group_of_one_alone_and_weighs_by_use():
    s = sample_signals(m_smoe.card.signals, 2)
    load_ = np.bincount(s["router_experts"][s["router_experts"] >= 0], minlength=14)
    merged = m_smoe(**s, k=14)
    assert np.array_equal(np.sort(merged["dominant"]), np.arange(14))
    assert np.allclose(merged["expert_gate"], s["expert_gate"][merged["dominant"]])
    one = m_smoe(**s, k=1, matched=False)
    assert np.allclose(one["expert_up"][0], np.average(s["expert_up"], axis=0, weights=load_), atol=1e-5)


def test_uncurl_finds_planted_clusters_that_dominant_experts_miss():
    rng = np.random.default_rng(0)
    parts = np.array([0, 0, 0, 1, 1, 2, 2])
    s = sample_signals(m_smoe.card.signals, 0, e=7, n=400, a=1)
    s["router_scores"] = (rng.normal(size=(400, 3))[:, parts] + 0.1 * rng.normal(size=(400, 7))).astype(np.float32)
    s["router_experts"] = rng.choice([0, 1, 2], (400, 1))  # only the first cluster is used
    found = uncurl(**s, k=3)["assignment"]
    assert len({(a, b) for a, b in zip(found, parts, strict=True)}) == 3
    assert len({(a, b) for a, b in zip(m_smoe(**s, k=3)["assignment"], parts, strict=True)}) > 3


def test_experts_that_nobody_used_merge_to_their_mean():
    s = sample_signals(m_smoe.card.signals, 2)
    s["router_experts"] = np.full_like(s["router_experts"], -1)
    assert np.allclose(m_smoe(**s, k=1, matched=False)["expert_down"][0], s["expert_down"].mean(0), atol=1e-6)


def test_upcycling_draws_the_same_neurons_in_three_matrices_or_not():
    rng = np.random.default_rng(0)
    shapes = {"gate_proj": (40, 6), "up_proj": (40, 6), "down_proj": (6, 40)}
    dense = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    for shared in (True, False):
        grown = drop_upcycling(**dense, n_experts=3, ratio=0.5, shared=shared)
        kept = [(grown["expert_gate"] == dense["gate_proj"]).all(2), (grown["expert_up"] == dense["up_proj"]).all(2),
                (grown["expert_down"] == dense["down_proj"]).all(1)]
        assert all((k.sum(1) == 20).all() for k in kept)
        assert np.array_equal(kept[0], kept[1]) == np.array_equal(kept[0], kept[2]) == shared
        assert not np.array_equal(kept[0][0], kept[0][1])  # each expert its own


def test_upcycled_model_runs_loads_and_begins_as_the_dense_one(tmp_path):
    llama = small("llama", num_key_value_heads=1)
    naive = upcycle(llama, 4, 2, ratio=0)
    assert change(naive, llama) < 1e-4
    upcycle(llama, 4, 2, ratio=0.5, seed=3).save_pretrained(tmp_path)
    assert change(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), upcycle(llama, 4, 2, seed=3)) < 1e-5


def test_planted_faults_are_seen(monkeypatch):
    model, llama = small("mixtral"), small("llama")
    nothing = {layer: np.arange(6) for layer in ("model.layers.0.mlp", "model.layers.1.mlp")}
    assert change(prune_experts(model, nothing), model) == 0
    monkeypatch.setattr(surgery, "_PARTS", surgery._PARTS[1:])  # the router is forgotten
    assert change(prune_experts(model, {layer: x[::-1] for layer, x in nothing.items()}), model) > 0.1
    monkeypatch.setattr(surgery, "_redrawn", lambda matrix, index, rng: matrix[:, ::-1])  # copies that are none
    assert change(upcycle(llama, 4, 2, ratio=0), llama) > 0.1


@pytest.mark.parametrize(("keep", "says"), [
    ({"model.layers.0.mlp": [0]}, "must have the layers"),
    ({"model.layers.0.mlp": [0], "model.layers.1.mlp": [0, 1]}, "as many experts in every layer"),
    (dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp"), [0, 0]), "distinct"),
    (dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp"), [6]), r"\[0, 6\)"),
    (dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp"), []), "distinct"),
    (dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp"), Selection([0], n=4)), "chooses from 4"),
])
def test_bad_choices_are_refused(keep, says):
    with pytest.raises(ValueError, match=says) as e: prune_experts(small("mixtral"), keep)
    assert "`keep`" in str(e.value)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="`model` is of type 'llama'"): prune_experts(small("llama"), {})
    with pytest.raises(ValueError, match="`model` must be a Llama"): upcycle(small("olmoe"))
    with pytest.raises(ValueError, match="`k` must lie"): upcycle(small("llama"), 2, 3)
    biased = build({"config": LlamaConfig(**SIZES, mlp_bias=True).to_dict()})
    with pytest.raises(ValueError, match="biases"): upcycle(biased)
    with pytest.raises(ValueError, match="`model` must be a module"): prune_experts(3, {})
    with pytest.raises(ValueError, match="`ratio`"): upcycle(small("llama"), ratio=2)


# A model that is trained


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    words = np.array("the cat dog sat ran on a mat under tree and then it slept".split())
    return [" ".join(rng.choice(words, 30)) for _ in range(80)]


def trained(seed, texts, layers=1):
    from transformers import OlmoeConfig
    sizes = SIZES | {"num_hidden_layers": layers, "num_experts": 6, "output_router_logits": True}
    return train_lm(OlmoeConfig(**sizes), texts, 2_000, seed, block=32, batch_size=4, checkpoint_every=0)


def test_a_study_of_experts_compares_with_random(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path))
    task = expert_task(partial(trained, texts=texts[:40]), texts[:40], texts[40:], n_test=10, n_tokens=256)
    study = Study(task, [*CRITERIA], [2, 6], seeds=2)
    results = study.run()
    assert study.errors().empty
    value = results[results.budget == 6].groupby(["seed", "method"]).value.first().unstack()
    assert np.allclose(value, value[["everything"]].to_numpy(), atol=1e-6)  # all that keep all are the whole model
    whole = -held_out_loss(trained(1, texts[:40]), [t for t in surgery._drawn(texts[40:], 10, _after(task, 1))])
    assert np.isclose(value.loc[1, "everything"], whole)


def _after(task, seed):
    "The generator of a fold after it has drawn the calibration texts."
    rng = np.random.default_rng([seed, 5])
    rng.permutation(40)
    return rng


def test_a_task_of_one_layer_of_several(texts):
    model = trained(0, texts[:40], layers=2)
    with pytest.raises(ValueError, match="`layer` must be one of"): expert_task(model, texts[:40], texts[40:])
    with pytest.raises(ValueError, match="`test_texts`"): expert_task(model, texts[:41], texts[40:])
    task = expert_task(model, texts[:40], texts[40:], layer="model.layers.1.mlp", n_tokens=256)
    half = task.evaluate(methods["reap"](**{s: task.signal(s) for s in methods["reap"].card.signals}, k=3))
    assert half["neg_loss"] != task.evaluate(Selection(np.arange(6), n=6))["neg_loss"]


def test_a_trained_model_stays_one_and_trains_on(texts):
    model = trained(0, texts[:40], layers=2)
    cut = prune_experts(model, choose_experts(naee, calibrate(model, texts[:20], 256), 3))
    assert cut.architecture["config"]["num_experts"] == 3 and np.isfinite(held_out_loss(cut, texts[40:]))
    more = train_lm(cut, texts[:40], 500, block=32, batch_size=4, checkpoint_every=0)
    assert more.architecture == cut.architecture


def nats_per_byte(model, texts):
    "By hand, from the losses of tokens."
    return sum(x.sum(dtype=np.float64) for x in model.token_losses(texts)) / sum(len(t.encode()) + 1 for t in texts)


def test_one_loss_per_byte_however_the_model_comes(texts):
    model = trained(0, texts[:40], layers=2)
    some = [*texts[40:50], "grün", ""]
    by_hand = nats_per_byte(model, some)
    whole = surgery.pruned_loss(Selection(np.arange(6), n=6), 0, model=model, layer="model.layers.0.mlp", texts=some)
    for value in (held_out_loss(model, some), held_out_loss(model, some, model.model()), -whole["neg_loss"],
                  surgery._silent_loss(model.model(), model, {}, some)):
        assert np.isclose(value, by_hand, rtol=1e-9)
    assert np.isclose(per_byte([x.sum() for x in model.token_losses(some)], some), by_hand, rtol=1e-6)
    for empty in (per_byte, held_out_loss):
        with pytest.raises(ValueError, match="`texts`"): empty(model, [])


def test_ablation_compares_with_others_of_the_layer(texts):
    model = trained(0, texts[:40], layers=2)
    table = ablate_experts(model, {"model.layers.0.mlp": [1, 2]}, texts[40:50], draws=3)
    assert table.what.tolist() == ["none", "flagged", *["random"] * 3]
    assert np.isclose(table.loss[0], nats_per_byte(model, texts[40:50])) and table.rise[0] == 0
    with pytest.raises(ValueError, match="`flagged`"):
        ablate_experts(model, {"model.layers.0.mlp": [0, 1, 2, 3]}, texts[:3])
