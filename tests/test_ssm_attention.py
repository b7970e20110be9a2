"Hidden attention: conformance, bounded memory, models of other kinds, a model left as it was, bad input."
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from selectbench.core.conformance import check_method
from selectbench.core.vocabulary import sample_signals
from selectbench.nn.scan import fast_scan, ssd_scan
from selectbench.ssm.attention import (
    _inputs,
    attention_means,
    attention_rollout,
    hidden_attention,
    hidden_output,
    scan_signals,
    token_attribution,
    weighted_attention,
)

NAMES = ("scan_delta", "scan_a", "scan_b", "scan_c")


def tiny(kind, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, num_hidden_layers=2, use_cache=False, **options))
    for p in model.parameters(): p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


MAMBA2 = dict(state_size=8, num_heads=8, head_dim=8, chunk_size=16)
JAMBA = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, num_experts=2, use_mamba_kernels=False,
             mamba_d_state=4, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1)
IDS = np.random.default_rng(0).integers(0, 64, 20)


def test_conforms(): check_method("hidden_attention")


def test_frame_is_the_lower_triangle():
    signals = sample_signals(NAMES)
    frame, means = hidden_attention(**signals), attention_means(**signals)
    i, j = frame.position.to_numpy(), frame.source.to_numpy()
    x = len(signals["scan_delta"])
    assert len(frame) == x * (x + 1) // 2 and (j <= i).all()
    assert np.array_equal(frame.attention, means["attention"][i, j])
    assert (frame.absolute >= frame.attention.abs() - 1e-12).all()


@pytest.mark.parametrize("block", (1, 50, 1000, 2**22))
def test_pieces_do_not_matter(block):
    signals = sample_signals(("scan_input", *NAMES), seed=1)
    rest = {name: signals[name] for name in NAMES}
    for name, value in attention_means(**rest).items():
        np.testing.assert_allclose(attention_means(**rest, block=block)[name], value, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(hidden_output(**signals, block=block), hidden_output(**signals), rtol=1e-11, atol=1e-13)


def test_memory_is_bounded():
    signals = sample_signals(NAMES, x=128, i=120, h=2)
    tracemalloc.start()
    attention_means(**signals, block=2**14)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.1 * 8 * 120 * 128 * 128


def test_long_steps_forget_and_do_not_overflow():
    signals = {k: v.astype(np.float64) for k, v in sample_signals(("scan_input", *NAMES)).items()}
    signals["scan_delta"] = 1e4 * signals["scan_delta"]
    u, delta, b, c = (signals[k] for k in ("scan_input", "scan_delta", "scan_b", "scan_c"))
    np.testing.assert_allclose(hidden_output(**signals), u * delta * (b * c).sum(1, keepdims=True), rtol=1e-9)


def test_mamba2_is_the_matrix_form():
    "Signals of Mamba-2 heads, against its own scan."
    model = tiny("mamba2", n_groups=1, **MAMBA2)
    for layer, s in scan_signals(model, IDS).items():
        mixer = model.get_submodule(layer)
        t = {k: torch.from_numpy(v).double() for k, v in s.items()}
        heads = t["scan_input"].unflatten(1, (8, 8))[None]
        y, _ = ssd_scan(heads, t["scan_delta"][None, :, ::8], -mixer.A_log.double().exp(), t["scan_b"][None, :, None],
                        t["scan_c"][None, :, None])
        np.testing.assert_allclose(hidden_output(**s), y[0].flatten(1).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "options"), (("falcon_mamba", {"state_size": 8}), ("jamba", JAMBA)))
def test_other_models(kind, options):
    "The input of the output projection, from the signals."
    model, seen = tiny(kind, **options), {}
    found = scan_signals(model, IDS)
    assert found
    for layer in found:
        mixer = model.get_submodule(layer)
        mixer.in_proj.register_forward_hook(lambda m, args, out, at=layer: seen.update({(at, "in"): out[0]}))
        mixer.out_proj.register_forward_pre_hook(lambda m, args, at=layer: seen.update({(at, "out"): args[0][0]}))
    with torch.no_grad(): model(torch.from_numpy(IDS)[None])
    for layer, s in found.items():
        y = torch.from_numpy(hidden_output(**s)) + model.get_submodule(layer).D * torch.from_numpy(s["scan_input"])
        made, gave = y * F.silu(seen[layer, "in"].chunk(2, -1)[1]), seen[layer, "out"]
        assert (made - gave).abs().max() < 1e-5 * gave.abs().max()
    assert np.isfinite(token_attribution(model, IDS).to_numpy()).all()


def test_model_is_left_as_it_was():
    model = tiny("mamba", state_size=8)
    plain = scan_signals(model, IDS)
    assert not any("forward" in vars(m) for m in model.modules())
    undo = fast_scan(model.train(), permanent=True)
    for p in model.parameters(): p.requires_grad_(False)
    fast, attribution = scan_signals(model, IDS), token_attribution(model, IDS)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert np.isfinite(attribution.to_numpy()).all()
    for layer, s in plain.items():
        for name, value in s.items(): np.testing.assert_allclose(fast[layer][name], value, rtol=1e-4, atol=1e-5)
    undo()
    with pytest.raises(IndexError): scan_signals(model, np.array([64]))
    assert model.training and not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("kind", "options"), (("mamba", {"state_size": 8}), ("mamba2", {"n_groups": 1, **MAMBA2})))
def test_gradient_of_what_a_block_reads(kind, options):
    "By finite differences; the models compute norms in single precision."
    model, step = tiny(kind, **options).double(), 1e-3
    with _inputs(model) as inputs: logit = model(torch.from_numpy(IDS)[None]).logits[0, -1, 5]
    found = torch.autograd.grad(logit, list(inputs.values()))
    for block, gradient in zip(model.backbone.layers, found, strict=True):
        way, ends = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).double(), []
        for sign in (1, -1):
            move = lambda m, args, by=sign * step * way: (args[0] + by, *args[1:])
            hook = block.register_forward_pre_hook(move)
            with torch.no_grad(): ends.append(model(torch.from_numpy(IDS)[None]).logits[0, -1, 5].item())
            hook.remove()
        assert np.isclose((ends[0] - ends[1]) / (2 * step), (gradient * way).sum().item(), rtol=1e-2)


def test_rollout_by_hand():
    a, b = np.array([[0.0, 0], [1, 1]]), np.array([[1.0, 0], [3, 0]])
    np.testing.assert_allclose(attention_rollout([a, b]), [[1, 0], [3 / 4 + 1 / 12, 1 / 6]])
    np.testing.assert_allclose(attention_rollout([a, b], start=1), [[1, 0], [3 / 4, 1 / 4]])


BAD = ({"scan_delta": 0}, {"scan_delta": -1}, {"scan_a": 0}, {"scan_a": -1}, {"scan_b": np.nan}, {"scan_c": np.inf})


@pytest.mark.parametrize("change", BAD)
@pytest.mark.parametrize("function", (hidden_attention, attention_means, hidden_output))
def test_bad_signals(function, change):
    (name, factor), = change.items()
    signals = sample_signals((*(("scan_input",) if function is hidden_output else ()), *NAMES))
    signals[name] = signals[name] * np.float32(factor)
    with pytest.raises(ValueError, match=f"`{name}`"): function(**signals)


def test_bad_arguments():
    signals, model = sample_signals(NAMES), tiny("mamba", state_size=8)
    means = attention_means(**signals)
    cases = {"channel": [lambda v=v: hidden_attention(**signals, channel=v) for v in (18, -1, 0.5)],
             "block": [lambda v=v: hidden_attention(**signals, block=v) for v in (0, 2.5)],
             "scan_b": [lambda: attention_means(**signals | {"scan_b": signals["scan_b"][1:]}),
                        lambda: attention_means(**signals | {"scan_b": np.ones((17, 19), dtype=int)})],
             "scan_input": [lambda: hidden_output(np.ones((3, 3)), **signals)],
             "matrices": [lambda v=v: attention_rollout(v) for v in (np.ones((2, 2)), -np.ones((1, 3, 3)))],
             "start": [lambda: attention_rollout(np.ones((1, 3, 3)), start=1)],
             "gradient": [lambda v=v: weighted_attention(means, v) for v in (np.ones((17, 4)), np.ones((3, 4)))],
             "ids": [lambda v=v: scan_signals(model, np.zeros(**v))
                     for v in ({"shape": (2, 3), "dtype": int}, {"shape": 3}, {"shape": 0, "dtype": int})],
             "model": [lambda: scan_signals(tiny("mamba2", n_groups=2, **MAMBA2), IDS),
                       lambda: scan_signals(torch.nn.Linear(2, 2), IDS), lambda: token_attribution("mamba", IDS)]}
    for name, calls in cases.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"`{name}`"): call()
