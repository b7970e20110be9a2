"Skill-It against the mixtures of the authors' program (tests/data/skill_it_reference.npz); bad input of both policies."
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from selectbench.core.policy import StepSignals, random_run
from selectbench.data.mixture import DGA, SkillIt, draw_rows, graph_from_pairs, graph_from_solo, lm_skills_graph

reference = np.load(Path(__file__).parent / "data" / "skill_it_reference.npz")
two, documents = np.array([0, 1]), np.array([[0, 0], [1, 1]])


def walk(policy, losses, steps):
    "The mixture in force at every step, when the j-th reading of the validation losses gives row j of `losses`."
    skills = len(policy.skills_graph)
    state = policy.init(skills, documents=np.arange(skills)[:, None], steps=steps, seed=0)
    readings = iter(losses)
    for step in range(steps):
        yield state["mixture"]
        lazy = {"validation_losses": lambda: next(readings)}
        state, choice = policy.step(state, StepSignals({"step": step, "steps": steps}, lazy))
        assert choice is None


@pytest.mark.parametrize("name", ["lego", "addition", "identity", "target"])
def test_mixtures_are_those_of_the_authors_program(name):
    losses, graph, targets = (reference[f"{name}_{k}"] for k in ("losses", "graph", "targets"))
    eta, window, rounds, evaluations = reference[f"{name}_setting"]
    rounds, evaluations = int(rounds), int(evaluations)
    policy = SkillIt(np.arange(len(graph)), targets, graph, eta=eta, rounds=rounds, window=int(window),
                     evaluations=evaluations, average=name == "target")
    steps = 2 * rounds * evaluations
    ours = list(walk(policy, losses[:, targets], steps))[::2 * evaluations]
    assert np.abs(np.array(ours) - reference[f"{name}_mixtures"]).max() < 1e-9


def test_the_loss_is_read_at_the_beginning_of_rounds_only():
    read, steps, policy = [], 20, SkillIt(two, two, np.eye(2), rounds=4, evaluations=2)
    state = policy.init(2, documents=documents, steps=steps, seed=0)
    for step in range(steps):
        lazy = {"validation_losses": lambda step=step: read.append(step) or np.ones(2)}
        state, _ = policy.step(state, StepSignals({"step": step, "steps": steps}, lazy))
    assert read == [0, 3, 5, 8, 10, 13]  # halves of the first three rounds of five steps; the last sets nothing


def test_the_mean_loss_of_a_skill_does_not_depend_on_how_many_texts_it_has():
    losses = np.array([[1.0, 3.0, 4.0]])
    policy = SkillIt(two, np.array([0, 0, 1]), np.eye(2), eta=1.0, rounds=2, window=1)
    last = list(walk(policy, losses, 2))[-1]
    assert np.allclose(last, np.exp([2, 4]) / np.exp([2, 4]).sum())


def test_large_losses_do_not_overflow():
    last = list(walk(SkillIt(two, two, np.eye(2), eta=1e4, rounds=2), np.array([[1.0, 3.0]]), 2))[-1]
    assert np.array_equal(last, [0, 1])


def slow_gradient(model, blocks):
    "The gradient of the mean row loss, a token at a time, in double precision."
    total = 0
    for ids, mask in zip(blocks.tokens, blocks.mask, strict=True):
        for t in np.flatnonzero(mask):
            loss = -torch.log_softmax(model(torch.tensor(ids[None, t])), -1)[0, ids[t + 1]] / mask.sum() / len(blocks)
            total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()
    return total.numpy()


def test_dga_moves_by_the_inner_products():
    run, groups = random_run(), np.arange(40) % 4
    policy = DGA(groups, eta=7.0, every=2, beta=0.25, batch=100, start=[1, 2, 3, 4])  # a batch of all rows there are
    state = policy.init(40, documents=run.pool.documents, steps=9, seed=0)
    assert np.allclose(state["mixture"], [0.1, 0.2, 0.3, 0.4])
    signals = run.step(4, np.arange(8))
    target = slow_gradient(run.model, signals["validation"])
    products = [slow_gradient(run.model, run.pool[groups == d]) @ target for d in range(4)]
    moved = state["mixture"] * np.exp(7.0 * np.array(products))
    want = 0.25 * state["mixture"] + 0.75 * moved / moved.sum()
    assert np.abs(want - state["mixture"]).max() > 0.01
    assert np.allclose(policy.step(state, signals)[0]["mixture"], want, atol=1e-5)
    assert policy.step(state, run.step(3, np.arange(8)))[0] is state  # not this time


def test_a_small_batch_is_drawn_from_the_domain_and_from_the_target(monkeypatch):
    from selectbench.signals import step
    run, groups, seen = random_run(), np.arange(40) % 4, []
    monkeypatch.setattr(step, "flat_gradient", lambda model, blocks: seen.append(blocks) or torch.ones(1))
    policy = DGA(groups, batch=3)
    state = policy.init(40, documents=run.pool.documents, steps=9, seed=0)
    policy.step(state, run.step(0, np.arange(8)))
    assert [len(np.unique(b.first)) for b in seen] == [3] * 5
    assert [set(b.first % 4) for b in seen[1:]] == [{0}, {1}, {2}, {3}]


def test_the_draw_is_of_every_row_and_no_other():
    rows = draw_rows([0.5, 0.5], np.array([1, 0, 1, 1]), 400, np.random.default_rng(0))
    assert set(rows) == {0, 1, 2, 3}
    assert abs((rows == 1).mean() - 0.5) < 0.1
    rows = draw_rows([0.1, 0.6, 0.3], np.repeat([2, 0, 1], 10), 30_000, np.random.default_rng(0))
    expected = 3_000 * np.repeat([0.3, 0.1, 0.6], 10)
    assert chisquare(np.bincount(rows, minlength=30), expected).pvalue > 0.01


def test_graphs_refuse_another_shape():
    with pytest.raises(ValueError, match="`solo`"): graph_from_solo(np.ones(2), np.ones((2, 3)))
    with pytest.raises(ValueError, match="`pairs`"): graph_from_pairs(np.ones(3), np.ones((2, 2)))


def test_a_measured_graph_needs_texts_and_targets_of_every_domain():
    with pytest.raises(ValueError, match="`groups`"):
        lm_skills_graph(["a", "b"], np.array([0, 2]), ["a", "b"], two)
    with pytest.raises(ValueError, match="`target_groups`"):
        lm_skills_graph(["a", "b"], two, ["a", "b"], np.array([1, 1]))


def test_a_measured_graph_knows_what_helps(tmp_path, monkeypatch):
    "Two domains of letters, the second split in two: its halves help each other, the first helps neither."
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path))
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(letters), 60)) for letters in ("abcd", "wxyz", "wxyz") for _ in range(12)]
    groups = np.repeat(np.arange(3), 12)
    graph = lm_skills_graph(texts, groups, texts, groups, tokens=3_000, block=32)
    assert graph.dtype == np.float32 and (np.diag(graph) > 0).all()
    assert min(graph[1, 2], graph[2, 1]) > 0 and graph[0, 1:].max() == 0 and graph[1:, 0].max() == 0


BAD = {
    "`skills_graph` has 3 along g": dict(skills_graph=np.ones((2, 3))),
    "`skills_graph` must not be negative": dict(skills_graph=np.array([[1, -0.1], [0, 1]])),
    "`skills_graph` has an empty row, 1": dict(skills_graph=np.array([[1.0, 1], [0, 0]])),
    "`skills_graph` has 1 NaN": dict(skills_graph=np.array([[1, np.nan], [0, 1]])),
    "`groups`": dict(groups=np.array([0, 2])),
    "`target_groups` must lie": dict(target_groups=np.array([0, 2])),
    "`target_groups` is empty": dict(target_groups=np.array([], dtype=int)),
    "`rounds`": dict(rounds=0), "`window`": dict(window=0), "`evaluations`": dict(evaluations=0),
}


@pytest.mark.parametrize("message", BAD)
def test_skill_it_refuses(message):
    with pytest.raises(ValueError, match=message):
        SkillIt(**dict(groups=two, target_groups=two, skills_graph=np.eye(2)) | BAD[message])


STARTS = [[1.0], [1, -1], [0, 0], [1, np.nan]]


@pytest.mark.parametrize("options", [*(dict(start=s) for s in STARTS), dict(beta=1.1), dict(every=0), dict(batch=0)],
                         ids=str)
def test_dga_refuses(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"): DGA(two, **options)


def test_a_domain_without_rows_is_refused():
    for policy in (SkillIt(np.array([0, 0]), two, np.eye(2)), DGA(np.array([0, 0, 1]))):
        with pytest.raises(ValueError, match="`groups` must have texts of every domain"):
            policy.init(2, documents=documents, steps=9, seed=0)
    for groups in ([0], [0, -1]):
        with pytest.raises(ValueError, match="`groups` must"):
            DGA(np.array(groups)).init(2, documents=documents, steps=9, seed=0)


def test_missing_validation_texts_are_named():
    start = {"step": 0, "steps": 9}
    skill, dga = SkillIt(two, two, np.eye(2)), DGA(two)
    about = dict(documents=documents, steps=9, seed=0)
    for losses in ({}, {"validation_losses": np.ones(3)}):
        with pytest.raises(ValueError, match="`validation_texts`"):
            skill.step(skill.init(2, **about), StepSignals({**start, **losses}, {}))
    with pytest.raises(ValueError, match="`validation_texts`"):
        shown = {**start, "pool": None, "validation": None, "model": None}
        dga.step(dga.init(2, **about), StepSignals(shown, {}))
