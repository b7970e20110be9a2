"""Every registered method conforms, and every planted bad method is caught: the tests of the tests."""

from dataclasses import replace

import pytest

from selectbench import methods
from selectbench.core.architecture import ARCHITECTURE_CHECKS, planted_architectures
from selectbench.core.conformance import CHECKS, check_method, conformance, follows_shuffle, planted
from selectbench.core.policy import POLICY_CHECKS, planted_policies
from selectbench.core.vocabulary import SIGNALS


@pytest.mark.parametrize("name", list(methods))
def test_method_conforms(name): check_method(name)


@pytest.mark.parametrize("check", list(planted()))
def test_planted_bad_method_is_caught(check):
    "One bad method of each sort; a Selection itself refuses a repeated index, which the first check reports."
    wrong = conformance(planted()[check])
    assert wrong["valid_form" if check == "repeats" else check], f"{check} let its planted method pass: {wrong}"


def test_every_check_has_a_planted_method():
    assert {c.__name__ for c in CHECKS} <= set(planted())


PLANTED = planted_policies() + planted_architectures()[1:]


@pytest.mark.parametrize(("check", "bad"), PLANTED, ids=lambda x: x.__name__)
def test_planted_bad_policy_or_architecture_is_caught(check, bad): assert check(bad)


def test_every_check_of_a_policy_or_architecture_has_a_planted_one():
    assert {c for c, _ in PLANTED} == {*POLICY_CHECKS, *ARCHITECTURE_CHECKS}


def test_exemptions_have_reasons():
    known = {c.__name__ for c in (*CHECKS, *POLICY_CHECKS, *ARCHITECTURE_CHECKS)}
    for card in methods.cards():
        for check, reason in card["exempt"].items():
            assert check in known and len(reason) > 10, (card["name"], check)


@pytest.mark.parametrize(("name", "named"), [("heavy_hitters", "router_experts"), ("mamba_shedder", "kept_loss"),
                                             ("model_selector_adaptive", "oracle")])
def test_a_signal_that_does_not_follow_a_shuffle_is_caught(name, named, monkeypatch):
    "A signal that says more of the pool than its axes do has to declare how it follows."
    assert not follows_shuffle(methods[name])
    monkeypatch.setitem(SIGNALS, named, replace(SIGNALS[named], follow=lambda value, order, axis: value))
    assert follows_shuffle(methods[name])
