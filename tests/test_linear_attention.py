"Linear attention is its quadratic form in any chunks; a prefix is seen by all; masks and second readings count right."
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from selectbench.core.conformance import check_method
from selectbench.core.policy import Blocks
from selectbench.nn.blocks import block_config, block_lm
from selectbench.nn.linear_attention import (
    BaseConv,
    LMOutput,
    PrefixLinearAttention,
    ReadTwiceLM,
    TaylorAttention,
    after_prefix,
    read_twice,
    read_twice_config,
    taylor_attention,
    taylor_map,
    taylor_state,
)
from selectbench.zoo.lm import predict_blocks, train_lm
from selectbench.zoo.tokenizer import Symbols

known = np.load(Path(__file__).parent / "data" / "linear_attention_reference.npz")
NAMES = {"query": "proj_q", "key": "proj_k", "value": "proj_v", "out": "out_proj", "into": "in_proj",
         "conv": "conv.conv", "prefix_key": "proj_k_enc", "prefix_value": "proj_v_enc"}
SMALL = dict(heads=3, feature_dim=4, chunk=4)


def quadratic(q, k, v, seen):
    "The weighted mean with all pairs at once, those of bool `seen` [queries, keys]."
    s = q @ k.mT / q.shape[-1] ** 0.5
    w = (1 + s + s ** 2 / 2) * seen
    return w @ v / w.sum(-1, keepdim=True)


def draws(seed, t, *sizes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, t, n, dtype=torch.float64, generator=g) for n in sizes]


@pytest.mark.parametrize("name", ["based", "base_conv", "prefix_linear_attention"])
def test_conformance(name): check_method(name)


@settings(max_examples=60, deadline=None)
@given(t=st.integers(1, 20), prefix=st.integers(0, 9), chunk=st.integers(1, 25), d=st.integers(1, 5),
       p=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_chunk_is_the_quadratic_form_with_both_sets_of_keys(t, prefix, chunk, d, p, seed):
    q, k, v = draws(seed, t, d, d, p)
    first_k, first_v = draws(seed + 1, prefix, d, p)
    seen = torch.cat([torch.ones(t, prefix), torch.ones(t, t).tril()], 1).bool()
    want = quadratic(q, torch.cat([first_k, k], 2), torch.cat([first_v, v], 2), seen)
    state = taylor_state(first_k, first_v) if prefix else None
    assert torch.allclose(taylor_attention(q, k, v, state=state, chunk=chunk), want, atol=1e-9)


def test_map_has_each_pair_once():
    x = torch.randn(50, 7, dtype=torch.float64)
    s = x @ x.T / 7 ** 0.5
    assert taylor_map(x).shape[-1] == 36 and torch.allclose(taylor_map(x) @ taylor_map(x).T, 1 + s + s ** 2 / 2)


def test_step_by_step_is_the_recurrence():
    q, k, v = draws(0, 11, 3, 3, 2)
    numerator, denominator, out = torch.zeros(2, 3, 10, 2), torch.zeros(2, 3, 10), []
    for i in range(11):
        keys, reads = taylor_map(k[:, :, i]), taylor_map(q[:, :, i])
        numerator = numerator + keys[..., None] * v[:, :, i, None]
        denominator = denominator + keys
        out.append((reads[..., None] * numerator).sum(2) / (reads * denominator).sum(-1, keepdim=True))
    assert torch.allclose(taylor_attention(q, k, v, chunk=4), torch.stack(out, 2))
    carried = torch.cat([numerator, denominator[..., None]], -1)
    assert torch.allclose(taylor_state(k, v), carried) and carried[0].numel() == TaylorAttention(
        6, heads=3, feature_dim=3).state_size(11)


def test_gradients_by_finite_differences():
    leaves = [x[:1, :1].requires_grad_() for x in (*draws(0, 5, 2, 2, 2), *draws(1, 3, 2, 2))]
    run = lambda q, k, v, a, b: taylor_attention(q, k, v, state=taylor_state(a, b), chunk=2)
    assert torch.autograd.gradcheck(run, leaves) and torch.autograd.gradgradcheck(run, leaves)


def test_nothing_kept_is_as_large_as_all_states():
    b, h, t, d, p = 1, 2, 512, 8, 32
    kept, features = [], (d + 1) * (d + 2) // 2
    q, k, v = (torch.randn(b, h, t, n, requires_grad=True) for n in (d, d, p))
    with saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x): taylor_attention(q, k, v, chunk=64)
    assert max(kept) <= b * h * t * max(features, 64, p + 1) < b * h * t * features * p / 16


@pytest.mark.parametrize("which, layer, args", [("based", TaylorAttention(12, **SMALL), ()), ("conv", BaseConv(12), ()),
                                                ("prefix", PrefixLinearAttention(12, **SMALL), (6,))])
def test_authors_layers(which, layer, args):
    parts = [name.split(".") for name in layer.state_dict()]
    weights = {f"{a}.{b}": torch.from_numpy(known[f"{which}/{NAMES[a]}.{b}"]) for a, b in parts}
    layer.double().load_state_dict(weights)
    out = layer(torch.from_numpy(known["hidden"]), *args)
    assert np.allclose(out.detach().numpy(), known[f"{which}/out"], atol=1e-10)


@pytest.mark.parametrize("prefix", [0, 1, 5, 9, 40])
def test_prefix_is_seen_by_all_and_the_future_by_none(prefix):
    torch.manual_seed(0)
    layer, x = PrefixLinearAttention(8, heads=2, feature_dim=3, chunk=4), torch.randn(1, 9, 8, requires_grad=True)
    y = layer(x, prefix).sum((0, 2))
    seen = torch.stack([torch.autograd.grad(one, x, retain_graph=True)[0][0].abs().sum(-1) > 0 for one in y])
    assert torch.equal(seen, torch.ones(9, 9).tril().bool() | (torch.arange(9) < prefix))
    if not prefix: assert torch.equal(y, TaylorAttention.forward(layer, x).sum((0, 2)))


def test_prefix_layer_is_the_naive_sum():
    torch.manual_seed(0)
    layer, x = PrefixLinearAttention(8, heads=2, feature_dim=3, chunk=2).double(), torch.randn(2, 7, 8).double()
    split = lambda z: z.unflatten(-1, (2, -1)).transpose(1, 2)
    q, k, v, first_k, first_v = (split(f(x)) for f in (layer.query, layer.key, layer.value, layer.prefix_key,
                                                       layer.prefix_value))
    seen = torch.cat([torch.ones(7, 4), torch.ones(7, 7).tril()], 1)
    y = quadratic(q, torch.cat([first_k[:, :, :4], k], 2), torch.cat([first_v[:, :, :4], v], 2), seen)
    assert torch.allclose(layer(x, 4), layer.out(y.transpose(1, 2).flatten(2)))


def test_state_sizes():
    assert TaylorAttention(64, heads=4, feature_dim=16).state_size(1) == 153 * 4 * (16 + 1)
    assert PrefixLinearAttention(64).state_size(9999) == TaylorAttention(64).state_size(1)
    assert BaseConv(8).state_size(5) == 32
    pair = block_lm(11, mixer=["based", "attention"], mixer_options=[{}, {"window": 8}], width=64)
    assert pair.state_size(100) == 153 * 68 + 2 * 8 * 64


def test_masks_stay_in_the_prefix_and_their_loss_is_a_mean():
    torch.manual_seed(0)
    model, ids = ReadTwiceLM(11, prefix=6, share=0.5, weight=0.25, width=16, layers=1), torch.randint(11, (3, 10))
    torch.manual_seed(1)
    out = model(ids)
    torch.manual_seed(1)
    masked = (torch.rand(3, 10) < 0.5) & (torch.arange(10) < 6)
    read = model.lm(ids.masked_fill(masked, 11))[..., :11]
    assert isinstance(out, LMOutput) and torch.equal(out.logits, read)
    want = -read.log_softmax(-1)[masked].gather(-1, ids[masked][:, None]).mean() / 4
    assert torch.isclose(out.aux_loss, want)
    state = torch.get_rng_state()
    quiet = model.eval()(ids)
    assert quiet.aux_loss is None and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(quiet.logits, model.lm(ids)[..., :11])


def test_targets_behind_the_prefix():
    rows = Blocks(np.ones((2, 7), np.int32), np.array([[0, 0, 0, 0, 0, -1], [1, 1, 1, 1, 1, 1]], np.int32))
    assert after_prefix(rows, 4).documents.tolist() == [[-1, -1, -1, -1, 0, -1], [-1, -1, -1, -1, 1, 1]]
    assert np.array_equal(after_prefix(rows, 0).documents, rows.documents)


def test_trains_on_targets_behind_the_prefix():
    rng = np.random.default_rng(0)
    tokens = rng.integers(8, size=(200, 9))
    tokens[:, 5:] = tokens[:, [0]]                       # what follows the prefix is its first token
    rows = after_prefix(Blocks(tokens.astype(np.int32), np.tile(np.arange(200, dtype=np.int32)[:, None], (1, 8))), 4)
    config = read_twice_config(["prefix_linear_attention"], prefix=4, width=16, layers=2, mixer_options={"heads": 2})
    run = train_lm(config, rows, 4 * 16 * 80, tokenizer=Symbols(8), batch_size=16, lr=2e-2, checkpoint_every=0)
    hit = predict_blocks(run.model("cpu"), rows)[:, 4:] == tokens[:, 5:]
    assert run.curve.tokens.iloc[0] == 64 and hit[:, 1:].mean() > 0.9


@given(n=st.integers(1, 4), t=st.integers(2, 9), data=st.data())
def test_second_reading_is_the_row(n, t, data):
    context = data.draw(st.integers(1, t + 1))
    question = data.draw(st.integers(0, t + 1 - context))
    rng = np.random.default_rng(0)
    rows = Blocks(rng.integers(9, size=(n, t + 1)).astype(np.int32), rng.integers(-1, 3, size=(n, t)).astype(np.int32))
    before, twice = rows.tokens.copy(), read_twice(rows, context, question)
    end = context + question
    assert np.array_equal(twice.tokens[:, end:], rows.tokens) and np.array_equal(rows.tokens, before)
    assert np.array_equal(twice.tokens[:, :end], np.roll(rows.tokens[:, :end], question, 1))
    assert (twice.documents[:, :end] == -1).all() and np.array_equal(twice.documents[:, end:], rows.documents)
    plain = read_twice(rows.tokens.tolist(), context, question)
    assert np.array_equal(plain.tokens, twice.tokens) and plain.mask.sum() == n * t and plain.tokens.dtype == np.int32


@pytest.mark.parametrize("word, call", [
    ("`heads`", lambda: TaylorAttention(8, heads=3)),
    ("`chunk`", lambda: TaylorAttention(8, chunk=0)),
    ("`expand`", lambda: BaseConv(8, expand=0)),
    ("`prefix`", lambda: PrefixLinearAttention(8)(torch.ones(1, 2, 8), -1)),
    ("`prefix`", lambda: ReadTwiceLM(11, prefix=4, mixer="based")),
    ("`share`", lambda: ReadTwiceLM(11, prefix=4, share=1.5)),
    ("`weight`", lambda: ReadTwiceLM(11, prefix=4, weight=-0.1)),
    ("`prefix`", lambda: after_prefix(Blocks(np.ones((2, 4), int), np.ones((2, 3), int)), 3)),
    ("`rows`", lambda: read_twice(np.ones(3, int), 1)),
    ("`context`", lambda: read_twice(np.ones((2, 3), int), 4)),
    ("`question`", lambda: read_twice(np.ones((2, 3), int), 1, -1)),
])
def test_refusals(word, call):
    with pytest.raises(ValueError, match=word): call()


def test_config_tells_options_apart():
    config = read_twice_config(prefix=4, share=0.3, width=16)
    assert config.func is ReadTwiceLM and config(11).share == 0.3 and config.keywords["source"] == block_config(
        "prefix_linear_attention").keywords["source"]
