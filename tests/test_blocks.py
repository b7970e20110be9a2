"""Mixers of tokens against transformers' layers, their memory against what decoders carry, the model around them."""
import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, Mamba2Config, MambaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.mamba.modeling_mamba import MambaMixer

from selectbench.core.architecture import made
from selectbench.core.registry import methods
from selectbench.nn.blocks import Attention, BlockLM, Mamba, Mamba2, block_config, block_lm, in_sight, rotary, step_bias
from selectbench.zoo.lm import train_lm

TEXTS = [f"the {a} {b} sees the {b} {a}" for a in ("red", "old", "new", "wet") for b in ("cat", "dog", "owl", "fox")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path))
    torch.manual_seed(0)


def published(kind, width, **changes):
    "(transformers' layer, ours, the configuration), of equal sizes and with the same weights, none at its first value."
    if kind is Mamba:
        config = MambaConfig(hidden_size=width, state_size=6, num_hidden_layers=1, **changes)
        theirs, ours = MambaMixer(config, 0), Mamba(width, state=6, conv=config.conv_kernel)
    else:
        config = Mamba2Config(hidden_size=width, state_size=6, num_heads=2 * width // 8, head_dim=8,
                              num_hidden_layers=1, chunk_size=16, **changes)
        theirs = Mamba2Mixer(config, 0)
        ours = Mamba2(width, state=6, head_dim=8, groups=config.n_groups, conv=config.conv_kernel)
    with torch.no_grad():
        for p in theirs.parameters(): p.add_(0.1 * torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, config


KINDS = [(Mamba, {}), (Mamba, {"conv_kernel": 2}), (Mamba2, {"n_groups": 1}), (Mamba2, {"n_groups": 2})]


@pytest.mark.parametrize("kind, changes", KINDS)
@pytest.mark.parametrize("length", [1, 37])
def test_equals_the_layer_of_transformers(kind, changes, length):
    theirs, ours, _ = published(kind, 16, **changes)
    hidden, seen = torch.randn(2, length, 16, requires_grad=True), torch.randn(2, length, 16)
    found = []
    for layer in (theirs, ours):
        out = layer(hidden)
        names, leaves = zip(*layer.named_parameters(), strict=True)
        grads = torch.autograd.grad(out, (hidden, *leaves), seen)
        found.append(dict(zip(("out", "hidden", *names), (out, *grads), strict=True)))
    for name, value in found[0].items():
        scale = value.abs().max() if name != "A_log" else max(g.abs().max() for g in found[0].values())
        assert (found[1][name] - value).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("kind, changes", KINDS)
def test_state_is_what_the_cache_of_transformers_holds(kind, changes):
    theirs, ours, config = published(kind, 16, **changes)
    cache = DynamicCache(config=config)
    with torch.no_grad(): theirs(torch.randn(1, 9, 16), cache_params=cache)
    recurrent, convolution = cache.layers[0].recurrent_states[0], cache.layers[0].conv_states[0]
    assert convolution.shape[-1] == config.conv_kernel  # one input more than the next token needs
    assert ours.state_size(9) == recurrent.numel() + convolution[..., 1:].numel()


@pytest.mark.parametrize("kind, changes", KINDS)
def test_what_transformers_decodes_from_its_cache_is_what_ours_gives_at_once(kind, changes):
    theirs, ours, config = published(kind, 16, **changes)
    cache, hidden = DynamicCache(config=config), torch.randn(1, 9, 16)
    with torch.no_grad():
        outs = [theirs(hidden[:, a:b], cache_params=cache) for a, b in ((0, 6), (6, 7), (7, 8), (8, 9))]
        assert torch.allclose(torch.cat(outs, 1), ours(hidden), atol=1e-5)


def decode_mamba2(layer, hidden):
    "(outputs, what is carried) of one sequence [t, width], token by token, from the recurrence."
    inner, groups, n = layer.parts[0], layer.groups, layer.state
    past = torch.zeros(layer.conv1d.in_channels, layer.conv1d.kernel_size[0] - 1)
    h, outs = torch.zeros(layer.heads, inner // layer.heads, n), []
    for token in hidden:
        gate, mixed, step = layer.in_proj(token).split([inner, inner + 2 * groups * n, layer.heads])
        seen = torch.cat([past, mixed[:, None]], 1)
        past, mixed = seen[:, 1:], F.silu((seen * layer.conv1d.weight[:, 0]).sum(1) + layer.conv1d.bias)
        x, B, C = mixed.split(layer.parts)
        x = x.view(layer.heads, -1)
        B, C = (v.view(groups, n).repeat_interleave(layer.heads // groups, 0)[:, None] for v in (B, C))
        delta = F.softplus(step + layer.dt_bias)[:, None, None]
        h = torch.exp(-delta * layer.A_log.exp()[:, None, None]) * h + delta * x[..., None] * B
        y = ((h * C).sum(-1) + layer.D[:, None] * x).flatten() * F.silu(gate)
        y = y.view(groups, -1)
        y = (y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt()).flatten() * layer.norm.weight
        outs.append(layer.out_proj(y))
    return torch.stack(outs), [h, past]


@pytest.mark.parametrize("length", [1, 3, 70])
def test_state_of_mamba2_is_what_its_decoder_carries(length):
    layer, hidden = Mamba2(16, state=5, head_dim=4, groups=2), torch.randn(length, 16)
    with torch.no_grad(): (out, carried), whole = decode_mamba2(layer, hidden), layer(hidden[None])[0]
    assert torch.allclose(out, whole, atol=1e-5)
    assert sum(x.numel() for x in carried) == layer.state_size(length)


def attention_by_loops(layer, hidden):
    "The definition, one query at a time, with transformers' rotary positions."
    t, d = hidden.shape[1], layer.width // layer.heads
    q, k, v = (x.unflatten(-1, (layer.heads, d)).transpose(1, 2) for x in layer.qkv(hidden).chunk(3, -1))
    angles = torch.outer(torch.arange(t), 10_000.0 ** (-torch.arange(0, d, 2) / d)).repeat(1, 2)[None]
    q, k = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    outs = []
    for i in range(t):
        first = 0 if layer.window is None else max(0, i + 1 - layer.window)
        scores = (q[:, :, i: i + 1] * k[:, :, first: i + 1]).sum(-1) / d ** 0.5
        outs.append((scores.softmax(-1)[..., None] * v[:, :, first: i + 1]).sum(2))
    return layer.out_proj(torch.stack(outs, 1).flatten(2))


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_attention_is_its_definition(window):
    layer, hidden = Attention(24, heads=3, window=window).double(), torch.randn(2, 20, 24, dtype=torch.float64)
    assert torch.allclose(layer(hidden), attention_by_loops(layer, hidden), atol=1e-6)


def test_rotary_is_that_of_transformers():
    x = torch.randn(2, 3, 11, 8)
    angles = torch.outer(torch.arange(11), 100.0 ** (-torch.arange(0, 8, 2) / 8)).repeat(1, 2)[None]
    assert torch.allclose(rotary(x, 100.0), apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())[0], atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50))
def test_a_token_sees_itself_and_those_before_it_in_the_window(length, window):
    seen = in_sight(length, window)
    assert seen.sum(1).tolist() == [min(i + 1, window) for i in range(length)]
    assert seen.diagonal().all() and not seen.triu(1).any()
    assert Attention(8, heads=2, window=window).state_size(length) == 2 * 8 * seen[-1].sum()


def test_fresh_weights_are_those_of_the_authors():
    mamba, mamba2 = Mamba(64, state=5), Mamba2(512, head_dim=4)
    assert torch.allclose(mamba.A_log.exp(), torch.arange(1.0, 6).expand(128, 5))
    assert torch.equal(mamba.D, torch.ones(128)) and mamba.dt_proj.in_features == 4
    assert mamba.dt_proj.weight.abs().max() <= 0.5
    A = mamba2.A_log.exp()
    assert abs(A.min() - 1.5) <= 0.5 and abs(A.max() - 15.5) <= 0.5 and abs(A.mean() - 8.5) < 1.5
    for bias in (mamba.dt_proj.bias, mamba2.dt_bias):
        step = F.softplus(bias)
        assert step.min() >= 0.999e-3 and step.max() <= 0.1001
    logs = F.softplus(step_bias(4000)).log10()
    assert abs(logs.mean() + 2) < 0.05 and abs(logs.std() - 2 / 12 ** 0.5) < 0.05


# Every registered mixer: what has a `state_size` and does not say that it reads in both directions


def mixers():
    cards = [c for c in methods.cards() if c["family"] == "ssm" and c["kind"] == "architecture"]
    return [c["name"] for c in cards if hasattr(methods[c["name"]], "state_size")]


def causal_mixers():
    "Those that neither say `causal = False` nor take a prefix."
    return [name for name in mixers() if getattr(methods[name], "causal", True)
            and "prefix" not in inspect.signature(methods[name].forward).parameters]


def looks_ahead(module, hidden):
    "The positions whose change reaches an earlier output of `module`, and those that reach nothing at all."
    with torch.no_grad():
        before, ahead, deaf = module(hidden), [], []
        for at in range(hidden.shape[1]):
            changed = hidden.clone()
            changed[:, at] += torch.randn_like(changed[:, at])
            moved = (module(changed) - before).abs().amax((0, 2)) > 1e-5 * before.abs().max()
            if moved[:at].any(): ahead.append(at)
            if not moved.any(): deaf.append(at)
    return ahead, deaf


@pytest.mark.parametrize("name", causal_mixers())
def test_no_mixer_looks_ahead(name):
    module, (hidden, *_) = made(methods[name])
    hidden = torch.randn(2, 12, hidden.shape[-1])
    assert module(hidden).shape == hidden.shape
    assert looks_ahead(module, hidden) == ([], [])


def test_a_mixer_that_looks_ahead_is_caught():
    class Ahead(nn.Module):
        def forward(self, hidden): return hidden + 0.1 * hidden.mean(1, keepdim=True)

    class Deaf(nn.Module):
        def forward(self, hidden): return torch.ones_like(hidden)
    assert looks_ahead(Ahead(), torch.randn(2, 6, 4)) == ([1, 2, 3, 4, 5], [])
    assert looks_ahead(Deaf(), torch.randn(2, 6, 4)) == ([], [*range(6)])


@pytest.mark.parametrize("name", mixers())
def test_state_size_is_a_number_that_never_falls(name):
    module, _ = made(methods[name])
    sizes = [module.state_size(t) for t in (1, 10, 100)]
    assert all(isinstance(s, int) and s > 0 for s in sizes) and sizes == sorted(sizes)


# The model


HYBRID = dict(mixer=["mamba", "attention"], mixer_options=[{"state": 4}, {"heads": 2, "window": 3}])
SMALL = dict(width=16, layers=3, **HYBRID)


def test_mixers_take_turns_with_their_options():
    model = block_lm(40, **SMALL)
    assert [type(m).__name__ for m in model.mixers] == ["Mamba", "Attention", "Mamba"]
    assert model.mixers[1].window == 3 and model.mixers[2].A_log.shape == (32, 4)
    assert model.state_size(100) == sum(m.state_size(100) for m in model.mixers) == 2 * 32 * 7 + 2 * 16 * 3
    assert {m.A_log.shape[1] for m in block_lm(40, mixer=["mamba", Mamba], mixer_options={"state": 3}).mixers} == {3}
    assert [m.window for m in block_lm(40, mixer=partial(Attention, window=7)).mixers] == [7, 7]


def test_a_mixer_is_told_its_layer():
    class Told(Attention):
        def __init__(self, width, layer=0, **options):
            super().__init__(width, layer, **options)
            self.layer = layer
    assert [m.layer for m in block_lm(40, mixer=Told, layers=3).mixers] == [0, 1, 2]


def test_the_model_is_the_sum_of_its_parts():
    model = block_lm(40, **SMALL)
    ids = torch.randint(40, (2, 11))
    x = model.embedding.weight[ids]
    for block in model.blocks:
        x = x + block.mixer(F.rms_norm(x, (16,), eps=1e-5))
        h = F.rms_norm(x, (16,), eps=1e-5)
        gate, up, down = block.mlp[1].gate, block.mlp[1].up, block.mlp[1].down
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    expected = F.rms_norm(x, (16,), eps=1e-5) @ model.embedding.weight.T
    assert torch.allclose(model(ids), expected, atol=1e-6)
    assert gate.shape == (32, 16)


def test_no_feed_forward_layers_without_mlp():
    bare, mixer = (sum(p.numel() for p in m.parameters())
                   for m in (block_lm(40, mixer="mamba", width=16, layers=1, mlp=0), Mamba(16)))
    assert bare == 40 * 16 + 2 * 16 + mixer


def test_the_model_does_not_look_ahead_and_its_head_is_its_embedding():
    model, ids = block_lm(40, **SMALL), torch.randint(39, (1, 12))
    with torch.no_grad(): before = model(ids)
    for at in range(12):
        changed = ids.clone()
        changed[0, at] += 1
        with torch.no_grad(): moved = (model(changed) != before).any(-1)[0]
        assert not moved[:at].any() and moved[at]
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_the_same_model_with_their_own_weights(again):
    model, ids = block_lm(40, mixer=["attention", "mamba", "mamba2"], layers=3), torch.randint(40, (2, 9))
    other = again(model)
    assert torch.equal(other(ids), model(ids)) and other.head.weight is other.embedding.weight
    with torch.no_grad(): other.embedding.weight.mul_(2)
    assert not torch.equal(other(ids), model(ids))


class Prefixed(nn.Module):
    "Says which prefix it was given."
    def __init__(self, width, layer=0):
        super().__init__()
        self.seen = None

    def forward(self, hidden, prefix=0):
        self.seen = prefix
        return hidden


def test_a_prefix_reaches_the_mixers_that_take_one():
    model = block_lm(40, mixer=[Prefixed, "mamba"], prefix=5, layers=3)
    model(torch.randint(40, (1, 9)))
    assert [m.seen for m in model.mixers[::2]] == [5, 5]
    model = block_lm(40, mixer=Prefixed, layers=1)
    model(torch.randint(40, (1, 9)))
    assert model.mixers[0].seen == 0


WRONG = [(dict(vocab_size=0), "vocab_size"), (dict(width=0), "width"), (dict(layers=0), "layers"),
         (dict(mlp=-1), "mlp"), (dict(mixer=[]), "mixer"), (dict(mixer_options=[{}, {}]), "mixer_options"),
         (dict(prefix=3), "prefix"), (dict(prefix=-1), "prefix"), (dict(width=10, mixer="attention"), "heads"),
         (dict(mixer="attention", mixer_options={"window": 0}), "window"), (dict(mixer_options={"state": 0}), "state"),
         (dict(mixer_options={"dt_rank": 0}), "dt_rank"), (dict(mixer="mamba2", width=16), "head_dim"),
         (dict(mixer="mamba2", mixer_options={"groups": 3}), "groups"), (dict(layers=1.5), "layers")]


@pytest.mark.parametrize("change, name", WRONG)
def test_what_does_not_fit_is_a_value_error(change, name):
    with pytest.raises(ValueError, match=f"`{name}`"): block_lm(**{"vocab_size": 40} | change)


def test_other_bad_input():
    with pytest.raises(ValueError, match="`mixers`"): BlockLM(40, [])
    with pytest.raises(KeyError, match="mamba"): block_lm(40, mixer="mambo")
    model = block_lm(40)
    with pytest.raises(ValueError, match="`input_ids`"): model(torch.rand(2, 3))
    with pytest.raises(ValueError, match="`input_ids`"): model(torch.randint(40, (3,)))
    for mixer in (Attention(8), Mamba(8), Mamba2(8, head_dim=8)):
        with pytest.raises(ValueError, match="`hidden`"): mixer(torch.ones(1, 2, 8, dtype=torch.int64))


# Recipes


def test_a_recipe_is_plain_names_and_builds_the_same_model():
    recipe = block_config([partial(Mamba, state=4), "attention"], mixer_options=[None, {"heads": 2, "window": 3}],
                          width=16, layers=3)
    plain = {k: v for k, v in recipe.keywords.items() if k != "source"}
    assert plain == dict(SMALL, mixer=["selectbench.nn.blocks:Mamba", "selectbench.nn.blocks:Attention"])
    torch.manual_seed(1)
    one = recipe(40)
    torch.manual_seed(1)
    other = block_lm(40, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_options_given_win_over_those_bound():
    recipe = block_config(partial(Mamba, state=4, conv=3), mixer_options={"state": 5})
    assert recipe.keywords["mixer_options"] == [{"state": 5, "conv": 3}]


def test_a_recipe_needs_names():
    for nameless in (lambda width, layer: Mamba(width), partial(Mamba, 16)):
        with pytest.raises(ValueError, match="`mixer`"): block_config(nameless)
    with pytest.raises(ValueError, match="`mixer_options`"): block_config(["mamba", "attention"], mixer_options=[{}])


def test_training_learns_and_loads_again():
    trained = train_lm(block_config(**SMALL), TEXTS * 4, 3000, block=24, batch_size=4, lr=2e-2)
    assert trained.curve.loss.iloc[-3:].mean() < 0.6 * trained.curve.loss.iloc[0]
    model, ids = trained.model(), torch.randint(200, (1, 8))
    assert isinstance(model, BlockLM) and torch.equal(model(ids), trained.model()(ids))
    assert trained.embeddings(TEXTS[:2]).shape == (2, 16)
    again = train_lm(block_config(**SMALL), TEXTS * 4, 3000, block=24, batch_size=4, lr=2e-2)
    assert again.fingerprint == trained.fingerprint


def test_recipes_of_other_mixers_or_options_are_other_recipes():
    recipes = [("mamba", None), ("mamba", {"state": 3}), ("attention", None), (["mamba", "attention"], None)]
    keys = {train_lm.lazy(block_config(m, mixer_options=o, width=16), TEXTS, 100).key for m, o in recipes}
    assert len(keys) == len(recipes)
