"A trace says which experts ran: recomputed outputs, drops counted anew, padding, clean removal, what is refused."
import functools

import numpy as np
import pytest
import torch
import transformers

from selectbench.nn.moe import moe_lm
from selectbench.nn.trace import TYPES, expert_output, expert_weights, moe_layers, recompute, tiny_moe, trace

transformers.logging.set_verbosity_error()
DROPPING = ("switch_transformers", "nllb_moe")
SWITCHABLE = [kind for kind in TYPES if kind not in (*DROPPING, "llama4")]  # experts with several implementations


@functools.cache
def made(kind, **options): return tiny_moe(kind, **options)


def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def follows(model, seen, tolerance=1e-6):
    "Every layer's output is what follows from the trace."
    for layer in seen.layers:
        error = (recompute(model, seen, layer) - seen.outputs[layer]).abs().max() / seen.outputs[layer].abs().max()
        assert error < tolerance, (layer, error)


@pytest.mark.parametrize("kind", TYPES)
def test_outputs_follow_from_the_trace_and_logits_are_untouched(kind):
    model, batch = made(kind)
    seen, given = trace(model, batch, outputs=True), []
    follows(model, seen)
    handle = model.register_forward_hook(lambda module, args, output: given.append(output.logits))
    with torch.no_grad(): model(**batch)
    trace(model, batch, norms=True, peaks=True, outputs=True)
    handle.remove()
    assert torch.equal(*given) and hooks(model) == 0 and not model.training
    assert all(p.grad is None and p.requires_grad == (not name.endswith("e_score_correction_bias"))
               for name, p in model.named_parameters())
    for layer in seen.layers:
        experts, weights = seen.experts[layer], seen.weights[layer]
        assert experts.dtype == torch.int64 and weights.dtype == seen.scores[layer].dtype == torch.float32
        assert experts.min() >= -1 and experts.max() < seen.scores[layer].shape[1]
        assert (weights[experts < 0] == 0).all() and (weights[experts >= 0] > 0).all()
        ordered = experts.sort(-1).values
        assert not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()


@pytest.mark.parametrize("kind", SWITCHABLE)
def test_any_implementation_of_the_experts(kind):
    model, batch = tiny_moe(kind, rows=1, length=8)
    seen = {}
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        assert all(block.experts.config._experts_implementation == name for block in moe_layers(model).values())
        seen[name] = trace(model, batch, outputs=True)
        follows(model, seen[name])
    for layer in seen["eager"].layers:
        assert torch.equal(seen["eager"].experts[layer], seen["batched_mm"].experts[layer])
        assert torch.equal(seen["eager"].experts[layer], seen["grouped_mm"].experts[layer])


@pytest.mark.parametrize("kind", ["deepseek_v3", "dots1", "glm4_moe", "ernie4_5_moe", "deepseek_v2"])
def test_top_k_of_the_scores_fails_the_test_of_truth(kind):
    model, batch = made(kind)
    seen = trace(model, batch, outputs=True)
    layer = seen.layers[0]
    seen.experts[layer] = seen.scores[layer].topk(seen.experts[layer].shape[1], -1).indices
    with pytest.raises(AssertionError): follows(model, seen, 1e-2)


def test_a_correction_bias_enters_the_choice_and_not_the_weights():
    model, batch = tiny_moe("ernie4_5_moe")
    seen, layer = trace(model, batch), [*moe_layers(model)][0]
    p, bias = seen.scores[layer].softmax(-1), torch.from_numpy(expert_weights(model, layer)["correction"])
    chosen = (p + bias).topk(2, -1).indices
    assert torch.equal(chosen, seen.experts[layer])
    picked = p.gather(1, chosen)
    torch.testing.assert_close(seen.weights[layer], picked / picked.sum(-1, keepdim=True))


def test_switch_drops_what_exceeds_the_capacity_of_each_row():
    model, batch = tiny_moe("switch_transformers", rows=3, length=20, seed=1)
    seen = trace(model, batch)
    for layer in seen.layers:
        best = seen.scores[layer].argmax(-1).reshape(3, -1).tolist()
        capacity = model.config.expert_capacity
        expected = [e if row[:i].count(e) < capacity else -1 for row in best for i, e in enumerate(row)]
        assert seen.experts[layer].flatten().tolist() == expected and -1 in expected
        kept = seen.experts[layer][:, 0] >= 0
        torch.testing.assert_close(seen.weights[layer][kept, 0], seen.scores[layer].softmax(-1).max(-1).values[kept])


def test_nllb_is_reported_as_it_runs():
    model, batch = tiny_moe("nllb_moe", length=30)
    called = {}
    handles = [block.experts[f"expert_{e}"].register_forward_hook(
        lambda m, args, out, key=(path, e): called.update({key: len(args[0])}))
        for path, block in moe_layers(model).items() for e in range(4)]
    seen = trace(model, batch, outputs=True)
    for handle in handles: handle.remove()
    for layer in seen.layers:
        assert {e for path, e in called if path == layer} >= set(seen.experts[layer].unique().tolist()) - {-1}
    assert any((x == -1).any() for x in seen.experts.values())


def test_padding_is_left_out():
    model, batch = made("mixtral")
    ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
    mask[0, :5], mask[1, 9:] = 0, 0
    seen = trace(model, {"input_ids": ids, "attention_mask": mask}, norms=True, peaks=True, outputs=True)
    follows(model, seen)
    rows = [trace(model, ids[:1, 5:], outputs=True), trace(model, ids[1:, :9], outputs=True)]
    for layer in seen.layers:
        assert torch.equal(seen.positions[layer], mask.flatten().nonzero().flatten())
        for name in ("scores", "weights", "inputs", "outputs", "experts"):
            torch.testing.assert_close(getattr(seen, name)[layer], torch.cat([getattr(r, name)[layer] for r in rows]),
                                       atol=1e-4, rtol=1e-4)
        assert len(seen.norms[layer]) == int(mask.sum())


@pytest.mark.parametrize("kind", DROPPING)
def test_encoder_and_decoder_have_masks_of_their_own(kind):
    model, batch = made(kind)
    masks = {name.replace("input_ids", "attention_mask"): torch.ones_like(ids) for name, ids in batch.items()}
    masks["attention_mask"][0, 8:], masks["decoder_attention_mask"][1, 7:] = 0, 0
    seen = trace(model, batch | masks, outputs=True)
    follows(model, seen)
    assert [len(x) for x in seen.experts.values()] == [20, 17]


def test_a_mask_may_cover_the_past():
    model, batch = made("olmoe")
    ids = batch["input_ids"]
    with torch.no_grad(): past = model(ids[:, :8], use_cache=True).past_key_values
    mask = torch.ones_like(ids)
    mask[0, :2], mask[1, 11] = 0, 0
    seen = trace(model, {"input_ids": ids[:, 8:], "attention_mask": mask, "past_key_values": past})
    assert all(x.tolist() == [0, 1, 2, 3, 4, 5, 6] for x in seen.positions.values())


def test_hooks_go_even_after_an_exception():
    model, batch = made("qwen2_moe")
    block = [*moe_layers(model).values()][-1]
    handle = block.experts.register_forward_hook(lambda module, args, output: 1 / 0)
    with pytest.raises(ZeroDivisionError): trace(model, batch, outputs=True)
    handle.remove()
    assert hooks(model) == 0
    with pytest.raises(IndexError): trace(model, batch["input_ids"] + 1000)
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", ["olmoe", "phimoe", "switch_transformers", "nllb_moe"])
def test_training_mode_is_kept_and_random_numbers_are_not_drawn(kind):
    model, batch = tiny_moe(kind)
    model.train()
    given = []
    handle = model.register_forward_hook(lambda module, args, output: given.append(output.logits))
    torch.manual_seed(0)
    with torch.no_grad(): model(**batch)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    trace(model, batch, norms=True, peaks=True, outputs=True)
    handle.remove()
    assert torch.equal(*given) and torch.equal(torch.get_rng_state(), after) and model.training


@pytest.mark.parametrize("kind", ["llama4", "gpt_oss", "switch_transformers"])
def test_peaks_run_on(kind):
    model, batch = made(kind)
    other = {name: ids.flip(0).roll(1, 1) for name, ids in batch.items()}
    first, second = (trace(model, b, peaks=True).peaks for b in (batch, other))
    both = trace(model, other, peaks=first).peaks
    assert all(torch.equal(both[layer], torch.maximum(first[layer], second[layer])) for layer in both)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in (*DROPPING, "gpt_oss")])
def test_matrices_give_the_expert(kind):
    model, _ = made(kind)
    layer = [*moe_layers(model)][-1]
    w, x = expert_weights(model, layer), np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    for e in (0, len(w["gate"]) - 1):
        gate, up = x @ w["gate"][e].T, x @ w["up"][e].T
        y = (gate / (1 + np.exp(-gate)) * up) @ w["down"][e].T
        np.testing.assert_allclose(expert_output(model, layer, e, x), y, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", DROPPING)
def test_plain_experts_have_two_matrices(kind):
    model, _ = made(kind)
    layer = [*moe_layers(model)][0]
    w, x = expert_weights(model, layer), np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    inner = np.maximum(x @ w["up"][2].T + (w["up_bias"][2] if "up_bias" in w else 0), 0)
    y = inner @ w["down"][2].T + (w["down_bias"][2] if "down_bias" in w else 0)
    np.testing.assert_allclose(expert_output(model, layer, 2, x), y, atol=1e-4)
    assert "gate" not in w


@pytest.mark.parametrize("kind", TYPES)
def test_the_router_matrix_gives_the_scores(kind):
    model, batch = made(kind)
    seen = trace(model, batch, outputs=True)
    for layer in seen.layers:
        w = expert_weights(model, layer)
        scores = seen.inputs[layer].numpy() @ w["router"].T + w.get("router_bias", 0)
        np.testing.assert_allclose(seen.scores[layer], scores, atol=1e-4)


def made_here(router):
    "A small language model of layers of this package."
    torch.manual_seed(0)
    sizes = dict(width=16, layers=2, heads=2, n_experts=5, expert_width=8, k=2, shared_width=8, block=16)
    model = moe_lm(64, router=router, **sizes)
    for block in moe_layers(model).values():
        for p in block.parameters(): torch.nn.init.normal_(p, 0, 0.4)
    return model.eval()


@pytest.mark.parametrize("router", ["moe:TopK", "routers:Switch", "routers:ExpertChoice", "routers:HashRouting"])
def test_layers_made_here(router):
    model = made_here(f"selectbench.nn.{router}")
    ids, mask = torch.randint(0, 64, (2, 10)), torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:] = 0
    seen = trace(model, {"input_ids": ids, "attention_mask": mask}, norms=True, peaks=True, outputs=True)
    assert len(seen.layers) == 2 and all(len(x) == 17 for x in seen.experts.values()) and len(seen.shared) == 2
    follows(model, seen)
    w = {name: x.shape for name, x in expert_weights(model, seen.layers[0]).items()}
    assert w | {"router": (5, 16)} == {"gate": (5, 8, 16), "up": (5, 8, 16), "down": (5, 16, 8), "router": (5, 16)}
    assert hooks(model) == 0


def test_a_router_that_merges_experts_is_not_recomputed():
    model = made_here("selectbench.nn.competition:SMEAR")
    seen = trace(model, torch.randint(0, 64, (2, 10)), outputs=True)
    with pytest.raises(ValueError, match="`layer`"): recompute(model, seen, seen.layers[0])


def test_half_precision():
    model, batch = tiny_moe("mixtral")
    seen = trace(model.to(torch.bfloat16), batch, norms=True, peaks=True, outputs=True)
    assert all(x.dtype == torch.float32 for name in ("scores", "weights", "norms", "peaks", "inputs", "outputs")
               for x in getattr(seen, name).values())
    follows(model, seen, 2e-2)


def test_what_is_refused():
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="`model` has no router"): trace(dense, torch.zeros(1, 4, dtype=torch.long))
    model, batch = tiny_moe("olmoe")
    layer = [*moe_layers(model)][0]
    with pytest.raises(ValueError, match="`batch`"): trace(model, "words")
    padded = batch["input_ids"].clone()
    padded[0, -3:] = model.config.pad_token_id
    with pytest.raises(ValueError, match="`batch` holds padding"): trace(model, padded)
    trace(model, {"input_ids": padded, "attention_mask": torch.ones_like(padded)})
    x = torch.zeros(2, 32)
    for name, call in {"layer": ("model.layers.9.mlp", 0, x), "e": (layer, 6, x), "hidden": (layer, 0, x[0])}.items():
        with pytest.raises(ValueError, match=f"`{name}`"): expert_output(model, *call)
    with pytest.raises(ValueError, match="`hidden`"): expert_output(model, layer, 0, x / 0)
    with pytest.raises(ValueError, match="`layer`"): expert_weights(model, "model.layers.9.mlp")
    with pytest.raises(ValueError, match="`trace`"): recompute(model, trace(model, batch), layer)
    with pytest.raises(ValueError, match="`kind`"): tiny_moe("llama")
    with torch.no_grad(): moe_layers(model)[layer].gate.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="`model` gives NaN"): trace(model, batch)
