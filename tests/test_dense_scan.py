"The dense scan is the recurrence, its gradients exact, and the layers are those of the authors' code."
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selectbench.core.conformance import check_method
from selectbench.nn import dense_scan as module
from selectbench.nn.dense_scan import DenseSSM, DiagonalSSM, dense_scan, dense_scan_steps, unit_columns

REFERENCE = np.load(Path(__file__).parent / "data/sd_ssm_reference.npz")


def example(b=2, t=6, n=4, k=3, symbols=None, seed=0, dtype=torch.float64):
    "Random (dictionary, weights, inputs); with `symbols`, tokens take one of that many weights."
    draw = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, dtype=dtype, generator=draw)
    weights = r(symbols or b * t, k).softmax(-1)
    which = torch.randint(symbols, (b, t), generator=draw) if symbols else torch.arange(b * t).view(b, t)
    return [x.requires_grad_() for x in (r(k, n, n), weights[which].detach(), r(b, t, n))]


def answers(scan, values):
    "The result and the gradients of one sum of it with varying weights."
    out = scan(*values)
    seen = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * seen).sum(), values)]


def agree(ours, theirs, within):
    return all(torch.allclose(a, b, rtol=within, atol=within) for a, b in zip(ours, theirs, strict=True))


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 4), t=st.integers(1, 9), n=st.integers(1, 7), k=st.integers(1, 5),
       symbols=st.sampled_from([None, 1, 2]), norm=st.sampled_from([1.0, 1.1, 1.4, 2.0, 3.0]), seed=st.integers(0, 99))
def test_the_scan_is_the_recurrence(b, t, n, k, symbols, norm, seed):
    values = example(b, t, n, k, symbols, seed)
    fast, slow = (answers(partial(scan, norm=norm), values) for scan in (dense_scan, dense_scan_steps))
    assert agree(fast, slow, 1e-8)


@pytest.mark.parametrize("symbols", [None, 2])
@pytest.mark.parametrize("norm", [1.0, 1.2, 2.0])
def test_gradients_agree_with_finite_differences(symbols, norm):
    assert torch.autograd.gradcheck(partial(dense_scan, norm=norm), example(t=5, symbols=symbols))


def test_a_gradient_without_the_norms_is_found_out(monkeypatch):
    honest = module._to_weights
    monkeypatch.setattr(module, "_to_weights", lambda a, slope, *rest: honest(a, 0 * slope, *rest))
    assert not torch.autograd.gradcheck(dense_scan, example(t=5), raise_exception=False)


def test_inputs_in_any_layout():
    dictionary, weights, inputs = (x.detach() for x in example())
    plain = dense_scan(dictionary, weights, inputs)
    turned = [x.mT.contiguous().mT for x in (dictionary, weights, inputs)]
    assert torch.equal(plain, dense_scan(*turned)) and torch.equal(turned[2], inputs)


def test_columns_of_unit_norm():
    matrices, lengths = unit_columns(torch.randn(3, 5, 5, dtype=torch.float64), 1.3)
    assert torch.allclose((matrices.abs() ** 1.3).sum(-2), torch.ones(3, 5, dtype=torch.float64))
    assert lengths.shape == (3, 5)


def test_columns_of_unit_sum_keep_the_state_in_bounds():
    dictionary, weights, inputs = (x.detach() for x in example(t=200))
    inputs[:, 1:] = 0
    size = dense_scan(dictionary, weights, inputs, norm=1.0).abs().sum(-1)
    assert (size.diff(dim=1) <= 1e-12).all()


def test_a_state_that_outgrows_single_precision_is_not_hidden():
    ones = torch.ones(1, 64, 64), torch.ones(1, 200, 1), torch.ones(1, 200, 64)
    assert dense_scan(*ones, norm=1.0).isfinite().all() and not dense_scan(*ones, norm=1.2).isfinite().all()


def loaded(layer, prefix, names):
    "`layer` with the authors' weights."
    moved = {ours: torch.from_numpy(REFERENCE[f"{prefix}.{theirs}"]) for ours, theirs in names.items()}
    if "A_dict" in moved: moved["A_dict"] = moved["A_dict"].permute(2, 0, 1)
    if "phases" in moved: moved["phases"] = moved["phases"].angle()
    layer.load_state_dict(moved)
    return layer


DENSE = {f"{part}.{kind}": f"{where}{part}.{kind}" for where, part in
         (("block.", "A_selector"), ("", "norm"), ("", "readout")) for kind in ("weight", "bias")}
DENSE |= {"B.weight": "block.B.weight", "A_dict": "block.A_dict"}
DIAGONAL = {f"{part}.{kind}": f"{where}{part}.{kind}" for where, part in
            (("block.", "A_generator.0"), ("block.", "A_generator.2"), ("", "readout")) for kind in ("weight", "bias")}
DIAGONAL |= {"phases": "block.init_state"}
LAYERS = {"dense": (lambda norm=1.2: DenseSSM(5, state=8, matrices=3, norm=norm), DENSE),
          "diagonal": (lambda: DiagonalSSM(5, state=8), DIAGONAL)}


@pytest.mark.parametrize("name", LAYERS)
def test_the_authors_outputs_and_gradients(name):
    make, names = LAYERS[name]
    layer = loaded(make(), name, names)
    out = layer(torch.from_numpy(REFERENCE["dense_input"]))
    assert np.allclose(out.detach(), REFERENCE[f"{name}_output"], atol=2e-5)
    (out * torch.cos(torch.arange(out.numel())).view(out.shape)).sum().backward()
    for ours, theirs in names.items():
        if ours == "phases": continue
        found, wanted = layer.get_parameter(ours).grad.numpy(), REFERENCE[f"{name}_gradient.{theirs}"]
        if ours == "A_dict": wanted = wanted.transpose(2, 0, 1)
        assert np.allclose(found, wanted, atol=1e-4 * np.abs(wanted).max() + 1e-6), ours


def test_another_norm_is_not_the_authors():
    make, names = LAYERS["dense"]
    out = loaded(make(norm=1.3), "dense", names)(torch.from_numpy(REFERENCE["dense_input"]))
    assert not np.allclose(out.detach(), REFERENCE["dense_output"], atol=1e-3)


@pytest.mark.parametrize("name", ["sd_ssm", "diagonal_ssm"])
def test_conformance(name): check_method(name)


def test_order_matters_to_the_dense_layer_alone():
    torch.manual_seed(0)
    word, other = torch.randn(1, 9, 8), torch.randperm(9)
    for layer, same in ((DenseSSM(8), False), (DiagonalSSM(8), True)):
        ends = [layer(x)[0, -1] for x in (word, word[:, other])]
        assert torch.allclose(*ends, atol=1e-5) == same
        assert layer.state_size(1) == layer.state_size(1000) == (64 if isinstance(layer, DenseSSM) else 128)


@pytest.mark.parametrize("options", [{"state": 0}, {"matrices": 0}, {"norm": 0.9}, {"norm": np.inf}, {"width": 0}])
def test_bad_sizes(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"): DenseSSM(**{"width": 4} | options)


@pytest.mark.parametrize("name, position, shape", [("dictionary", 0, (3, 4, 5)), ("weights", 1, (2, 6, 2)),
                                                   ("weights", 1, (2, 5, 3))])
def test_bad_shapes(name, position, shape):
    values = example()
    values[position] = torch.ones(shape)
    with pytest.raises(ValueError, match=f"`{name}`"): dense_scan(*values)
