"The scan is exact in every shape and layout, and takes the place of a model's own without a trace when it is undone."
import copy
import sys
import types
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint

from selectbench.nn.scan import LARGE, fast_scan, scan_of, selective_scan, ssd_scan

transformers.logging.set_verbosity_error()


def example(b=2, d=37, t=75, n=5, dtype=torch.float64, layout="bdt", seed=0):
    "Random inputs of a scan, as keywords; `layout` is the order in memory."
    draw = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, dtype=dtype, generator=draw)
    made = {"u": r(b, d, t), "delta": F.softplus(r(b, d, t) - 2), "A": -torch.exp(r(d, n)), "B": r(b, n, t),
            "C": r(b, n, t), "D": r(d), "z": r(b, d, t), "initial_state": r(b, d, n)}
    if layout == "btd": made = {k: v.mT.contiguous().mT if v.dim() == 3 else v for k, v in made.items()}
    if layout == "apart": made = {k: torch.stack([v, v], -1)[..., 0] for k, v in made.items()}
    return made


def answers(scan, inputs):
    "Outputs and gradients of one sum of the outputs with varying weights."
    inputs = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    outputs = scan(**inputs)
    total = sum((x.double() * torch.cos(torch.arange(x.numel())).view(x.shape)).sum() for x in outputs)
    return [x.detach() for x in outputs] + list(torch.autograd.grad(total, list(inputs.values())))


def gap(a, b): return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def compare(ours, theirs): return max(gap(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True))


@contextmanager
def threads(many):
    before = torch.get_num_threads()
    torch.set_num_threads(many)
    try: yield
    finally: torch.set_num_threads(before)


# The scan


SHAPES = ({}, {"b": 1, "d": 1, "t": 1, "n": 1}, {"b": 1, "d": 64, "t": 100, "n": 16},
          {"b": 3, "d": 16, "t": 32, "n": 3}, {"b": 1, "d": 50, "t": 33, "n": 20})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_recurrence(shape):
    for states in (False, True):
        slow = answers(partial(selective_scan, backend="torch", return_states=states), example(**shape))
        for layout, many in (("bdt", 1), ("btd", 1), ("apart", 1), ("bdt", 2), ("btd", 3)):
            for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
                inputs = {k: v.to(dtype) for k, v in example(**shape, layout=layout).items()}
                with threads(many): seen = answers(partial(selective_scan, return_states=states), inputs)
                assert compare(seen, slow) < tolerance and all(x.dtype == dtype for x in seen)


@pytest.mark.parametrize("chunk", (1, 7, 16, 1000))
def test_chunks_change_nothing(chunk):
    for backend in ("numba", "torch"):
        seen = answers(partial(selective_scan, backend=backend, chunk=chunk), example(layout="btd"))
        assert compare(seen, answers(selective_scan, example())) < 1e-13


def test_the_recurrence_itself_written_out():
    "An own loop over batch, channel, time and state."
    inputs = example(1, 2, 4, 3)
    u, delta, A, B, C, D, z, h = (inputs[k][0] if inputs[k].dim() == 3 else inputs[k] for k in inputs)
    y, state = selective_scan(**inputs)
    for c in range(2):
        h_c = [float(v) for v in h[c]]
        for t in range(4):
            for j in range(3):
                h_c[j] = float(torch.exp(delta[c, t] * A[c, j])) * h_c[j] + float(delta[c, t] * u[c, t] * B[j, t])
            out = sum(float(C[j, t]) * h_c[j] for j in range(3)) + float(D[c] * u[c, t])
            assert abs(out * float(F.silu(z[c, t])) - float(y[0, c, t])) < 1e-12
        assert max(abs(a - float(b)) for a, b in zip(h_c, state[0, c], strict=True)) < 1e-12


def test_finite_differences_for_every_input():
    inputs = example(1, 17, 5, 2)
    inputs = {k: v[:, :2] if v.dim() == 3 and k not in "BC" else v[:2] if k in "AD" else v for k, v in inputs.items()}
    call = lambda *values: selective_scan(**dict(zip(inputs, values, strict=True)), return_states=True, chunk=2)
    check = partial(torch.autograd.gradcheck, rtol=1e-5, atol=1e-7, raise_exception=False)
    values = [v.requires_grad_() for v in inputs.values()]
    assert check(call, values)
    for k in range(len(values)):
        off = lambda *v, k=k: call(*v[:k], v[k] + 0.001 * (v[k] - v[k].detach()), *v[k + 1:])
        assert not check(off, values), f"a wrong gradient of {list(inputs)[k]} is not seen"


def test_only_what_is_asked_gets_a_gradient():
    "Optional inputs left out, gradients of one output alone, no gradient at all."
    inputs = {k: v for k, v in example().items() if k in ("u", "delta", "A", "B", "C")}
    assert compare(answers(selective_scan, inputs), answers(partial(selective_scan, backend="torch"), inputs)) < 1e-13
    u = inputs["u"].requires_grad_()
    for k in (0, 1):
        both = [torch.autograd.grad(selective_scan(**inputs, backend=b)[k].sum(), u)[0] for b in ("numba", "torch")]
        assert gap(*both) < 1e-13
    with torch.no_grad(): assert not selective_scan(**inputs)[0].requires_grad


def test_halves_and_inputs_are_left_alone():
    inputs = example()
    before = {k: v.clone() for k, v in inputs.items()}
    y, state = selective_scan(**inputs)
    cut = lambda part: {k: v[..., part] if v.dim() == 3 and k != "initial_state" else v for k, v in inputs.items()}
    first, middle = selective_scan(**cut(slice(None, 40)))
    second, last = selective_scan(**cut(slice(40, None)) | {"initial_state": middle})
    assert gap(torch.cat([first, second], -1), y) < 1e-14 and gap(last, state) < 1e-14
    assert all(torch.equal(before[k], inputs[k]) for k in inputs)
    assert gap(selective_scan(**cut(slice(40, None)))[1], state) > 1e-3


def test_extremes():
    "No step holds the state; a long one forgets it; a state that grows is followed; half precision comes back in half."
    inputs = example(1, 16, 8, 4, dtype=torch.float32)
    still = selective_scan(**inputs | {"delta": torch.zeros(1, 16, 8)})
    assert torch.equal(still[1], inputs["initial_state"])
    zeros, long = torch.zeros(1, 16, 8), torch.full((1, 16, 8), 1e4)
    gone = selective_scan(**inputs | {"delta": long, "u": zeros, "A": -torch.ones(16, 4)})
    assert not gone[1].any()
    grows = inputs | {"A": torch.ones(16, 4), "delta": torch.full((1, 16, 8), 5.0)}
    assert compare(answers(selective_scan, grows), answers(partial(selective_scan, backend="torch"), grows)) < 1e-5
    y, state = selective_scan(**{k: v.bfloat16() for k, v in inputs.items()})
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert gap(y.float(), selective_scan(**inputs)[0]) < 0.05


BAD = {"u": (torch.ones(2, 3), ValueError), "delta": (-torch.ones(1, 2, 3), ValueError),
       "A": (torch.ones(3, 2), ValueError), "B": (torch.ones(1, 2, 4), ValueError),
       "C": (torch.full((1, 2, 3), torch.nan), ValueError), "D": ([1.0, 2.0], TypeError),
       "z": (torch.ones(1, 2, 3).int(), TypeError), "initial_state": (torch.ones(1, 2, 3), ValueError),
       "chunk": (0, ValueError), "backend": ("cuda", ValueError)}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    value, error = BAD[name]
    with pytest.raises(error, match=f"`{name}`"): selective_scan(**example(1, 2, 3, 2) | {name: value})


# Mamba-2


def heads(b=2, t=150, h=4, p=6, g=2, n=5, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=draw).to(dtype)
    return {"x": r(b, t, h, p), "delta": F.softplus(r(b, t, h)), "A": -torch.exp(r(h)), "B": r(b, t, g, n),
            "C": r(b, t, g, n), "D": r(h), "initial_state": r(b, h, p, n)}


def by_heads(x, delta, A, B, C, D, initial_state):
    "Mamba-2 as one Mamba for each head."
    ys, states, share = [], [], x.shape[2] // B.shape[2]
    for k in range(x.shape[2]):
        p, n = x.shape[3], B.shape[3]
        row, column = B[:, :, k // share].mT, C[:, :, k // share].mT
        y, h = selective_scan(x[:, :, k].mT, delta[:, None, :, k].expand(-1, p, -1), A[k].expand(p, n), row, column,
                              D[k].expand(p), initial_state=initial_state[:, k])
        ys.append(y.mT)
        states.append(h)
    return torch.stack(ys, 2), torch.stack(states, 1)


@pytest.mark.parametrize("chunk", (1, 50, 64, 500))
def test_matrix_form_is_the_recurrence(chunk):
    slow, matrix = answers(by_heads, heads()), partial(ssd_scan, chunk=chunk, backend="torch")
    assert compare(answers(matrix, heads()), slow) < 1e-12
    assert compare(answers(matrix, heads(dtype=torch.float32)), slow) < 1e-5
    assert compare(answers(matrix, heads() | {"A": 1.001 * heads()["A"]}), slow) > 1e-5


@pytest.mark.parametrize("sizes", [{}, {"p": 8, "g": 4}, {"p": 17, "g": 1, "n": 33}, {"b": 1, "t": 1, "h": 1, "g": 1}])
def test_compiled_heads_are_the_matrix_form(sizes):
    slow, compiled = answers(partial(ssd_scan, backend="torch"), heads(**sizes)), partial(ssd_scan, backend="numba")
    assert compare(answers(compiled, heads(**sizes)), slow) < 1e-12
    assert compare(answers(compiled, heads(**sizes, dtype=torch.float32)), slow) < 1e-5
    assert compare(answers(compiled, heads(**sizes) | {"A": 1.001 * heads(**sizes)["A"]}), slow) > 1e-6


def test_large_states_take_the_matrix_form():
    for n, backend in ((LARGE, "numba"), (LARGE + 1, "torch")):
        inputs = heads(t=5, n=n, dtype=torch.float32)
        assert all(map(torch.equal, ssd_scan(**inputs), ssd_scan(**inputs, backend=backend)))


@pytest.mark.parametrize("backend", ("torch", "numba"))
def test_mamba2_keeps_its_digits(backend):
    "Exponents that add up to thousands within a chunk, in single precision."
    big = {k: v * 100 if k == "A" else v for k, v in heads().items()}
    single, scan = {k: v.float() for k, v in big.items()}, partial(ssd_scan, backend=backend)
    assert compare(answers(scan, single), answers(scan, big)) < 2e-5


@pytest.mark.parametrize("name, value", [
    ("x", torch.ones(1, 2, 3).double()), ("delta", -torch.ones(2, 150, 4).double()),
    ("B", torch.ones(2, 150, 3, 5).double()), ("chunk", 2.5), ("backend", "matrix")])
def test_bad_input_of_mamba2_is_named(name, value):
    changed = {"B": value, "C": value} if name == "B" else {name: value}
    with pytest.raises(ValueError, match=f"`{name}`"): ssd_scan(**heads() | changed)


# In the place of a model's own


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16}
KINDS = {
    "mamba": {"state_size": 8}, "falcon_mamba": {"state_size": 8},
    "jamba": ATTENTION | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8,
                          "mamba_dt_rank": 4},
    "zamba": ATTENTION | {"num_hidden_layers": 5, "n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4,
                          "attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 16},
    "bamba": ATTENTION | HEADS | {"attn_layer_indices": [1]},
    "falcon_h1": ATTENTION | HEADS | {"mamba_d_ssm": 64},
    "granitemoehybrid": ATTENTION | HEADS | {"layer_types": ["mamba", "attention"], "num_local_experts": 2,
                                             "num_experts_per_tok": 1, "shared_intermediate_size": 16},
    "zamba2": ATTENTION | {"num_hidden_layers": 4, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 2,
                           "mamba_d_state": 8, "chunk_size": 16, "num_mem_blocks": 1,
                           "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "nemotron_h": ATTENTION | {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8,
                               "chunk_size": 16, "layers_block_type": ["mamba", "attention"]},
}


def tiny(kind, noise=0.2):
    "A small random language model of this kind, its weights moved so that every part matters."
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters(): p.data.add_(noise * torch.randn_like(p))
    return model


def batch():
    torch.manual_seed(1)
    ids, mask = torch.randint(3, 64, (2, 37)), torch.ones(2, 37, dtype=torch.long)
    mask[0, :9] = 0
    return {"input_ids": ids, "attention_mask": mask}


def step(model):
    "Logits and gradients of a training step on a padded batch."
    model.train().zero_grad()
    out = model(**batch(), labels=batch()["input_ids"], use_cache=False)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def generated(model):
    made = model.eval().generate(**batch(), max_new_tokens=4, do_sample=False, output_logits=True,
                                 return_dict_in_generate=True)
    return torch.stack(made.logits)


def swapped(model): return sum("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_our_scan_says_the_same(kind):
    model = tiny(kind)
    mixers = sum(scan_of(m) is not None for m in model.modules())
    theirs, said = step(model), generated(model)
    with fast_scan(model) as same:
        assert same is model and swapped(model) == mixers > 0
        assert compare(step(model), theirs) < 1e-4
        assert gap(generated(model), said) < 1e-4
    assert swapped(model) == 0
    assert all(torch.equal(a, b) for a, b in zip(step(model), theirs, strict=True))


@pytest.mark.parametrize("kind, name", [("mamba", "_scan"), ("mamba2", "_ssd")])
def test_a_wrong_scan_is_seen(kind, name, monkeypatch):
    from selectbench.nn import scan
    model, honest = tiny(kind), getattr(scan, name)
    theirs = step(model)
    monkeypatch.setattr(scan, name, lambda u, delta, A, *rest, **options: honest(u, delta, 1.001 * A, *rest, **options))
    with fast_scan(model): assert compare(step(model), theirs) > 1e-4


def test_permanent_nested_copied_and_after_an_exception():
    model = tiny("mamba")
    other = copy.deepcopy(model)
    undo = fast_scan(model, permanent=True)
    with fast_scan(model): assert swapped(model) == 2
    assert swapped(model) == 2 and swapped(other) == 0
    twin = copy.deepcopy(model)
    assert twin.backbone.layers[0].mixer.forward.__self__ is twin.backbone.layers[0].mixer
    assert compare(step(twin), step(other)) < 1e-4
    undo()
    assert swapped(model) == 0 and swapped(twin) == 2
    with pytest.raises(KeyError), fast_scan(model): raise KeyError
    assert swapped(model) == 0 and list(model.state_dict()) == list(other.state_dict())


def test_gradient_checkpointing_and_float64():
    model = tiny("mamba").double()
    theirs = step(model)
    model.activation_checkpointing_enable()
    with fast_scan(model): assert compare(step(model), theirs) < 1e-6
    u = example(1, 3, 9, 2)
    run = lambda **inputs: checkpoint(lambda: selective_scan(**inputs), use_reentrant=False)
    assert compare(answers(run, u), answers(selective_scan, u)) < 1e-14


def test_what_is_not_known_is_left_as_it_is():
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    with pytest.raises(ValueError, match="`model`.*GPT2LMHeadModel"): fast_scan(gpt, permanent=True)
    with pytest.raises(TypeError, match="`model`"): fast_scan("mamba")
    model = tiny("mamba")
    mine = model.backbone.layers[0].mixer.forward = lambda x, **rest: x
    with pytest.raises(ValueError, match="`model`"): fast_scan(model, permanent=True)
    assert swapped(model) == 1 and model.backbone.layers[0].mixer.forward is mine


def test_kernels_of_a_package_stay_in_place(monkeypatch):
    "transformers' own decorator, with a package `mamba_ssm` that has the function."
    from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
    from transformers.models.mamba import modeling_mamba
    plain = modeling_mamba.mamba_selective_scan.__wrapped__
    package = types.ModuleType("mamba_ssm")
    package.selective_scan_fn = lambda *args, **rest: plain(*args, **rest)
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    made = use_kernel_func_from_hub_with_fallback("selective_scan_fn", "mamba_ssm")(plain)
    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", made)
    model = tiny("mamba")
    with pytest.warns(UserWarning, match="2 of 2 Mamba layers"), fast_scan(model): assert swapped(model) == 0
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fast_scan(model): assert swapped(model) == 2
