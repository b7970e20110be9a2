"""What `train_lm` promises across processes: kills, threads, the global generators, the cache; and what it takes."""
import importlib
import json
import linecache
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MambaConfig

from selectbench.core.cache import cache_folder, cached
from selectbench.zoo.lm import TrainedLM, train_lm
from selectbench.zoo.tokenizer import train_bpe

TEXTS = [f"The {a} {b} of {c}." for a in ("mean", "norm", "rank") for b in ("value", "error") for c in ("x", "yy", "z")]
GPT2 = GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2)  # with dropout, so a step draws
LLAMA = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                    max_position_embeddings=16)
MAMBA = MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, expand=2, time_step_rank=2)
run = partial(train_lm, texts=TEXTS, tokens=1000, batch_size=4, block=16)
STEPS = 16  # ceil(1000 / 64)


def own_module(vocab_size, width=8):
    "A module with the same call: ids to logits."
    return torch.nn.Sequential(torch.nn.Embedding(vocab_size, width), torch.nn.Linear(width, vocab_size))


@dataclass(frozen=True)
class Harder:
    "Keeps the rows above their own moving mean, at least two; notes its steps, and may die. Without state it is blind."
    def init(self, n, **about): return {"mean": np.zeros(n), "names": ["a", None], "count": 0}

    def step(self, state, signals):
        if "LM_LOG" in os.environ:
            with Path(os.environ["LM_LOG"]).open("a") as f: f.write(f"{signals['step']}\n")
        if str(signals["step"]) == os.environ.get("LM_STOP"): raise KeyboardInterrupt
        if str(signals["step"]) == os.environ.get("LM_DIE"): os.kill(os.getpid(), signal.SIGKILL)
        i, losses, mean = signals["index"], signals["losses"], state["mean"].copy()
        mean[i] = 0.5 * mean[i] + 0.5 * losses
        if state["count"] != signals["step"]: raise RuntimeError("the state is not that of the step before")
        return state | {"mean": mean, "count": state["count"] + 1}, np.argsort(mean[i] - losses, kind="stable")[:2]


@dataclass(frozen=True)
class Says:
    choice: object

    def init(self, n, **about): return None

    def step(self, state, signals): return state, self.choice


def killed_run(): return run(GPT2, policy=Harder(), checkpoint_every=3)


def dies_while_saving():
    "The same, killed when half of a checkpoint is written."
    import safetensors.torch

    def half(arrays, path):
        Path(path).write_bytes(safetensors.torch.save(arrays)[:500])
        os.kill(os.getpid(), signal.SIGKILL)
    safetensors.torch.save_file = half
    killed_run()


def weights(lm): return {k: v.numpy() for k, v in lm.state.items()}


def same(a, b): return all((x == y).all() for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "An empty cache and one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "rw")
    yield
    torch.set_num_threads(threads)


def child(call, **env):
    "Exit status of a process that makes `call` of this file."
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_lm; test_lm.{call}()"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run([sys.executable, "-c", program], env=env, stderr=subprocess.DEVNULL).returncode


def checkpoints(): return sorted(p.name for p in cache_folder().glob(".checkpoints/*/*"))


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("LM_LOG", str(log))
    steps = lambda: [int(x) for x in log.read_text().split()]
    assert child("killed_run", LM_DIE="7") == -signal.SIGKILL
    assert steps() == [*range(8)] and checkpoints() == ["step-000000006"]
    files = [p for p in cache_folder().glob(".checkpoints/*/*/*")]
    assert sorted(p.name for p in files) == ["arrays.safetensors", "tree.json"]
    assert json.loads(next(p for p in files if p.suffix == ".json").read_text().split("\n", 1)[1])
    log.write_text("")
    assert child("dies_while_saving") == -signal.SIGKILL
    assert steps() == [6, 7, 8] and checkpoints() == ["step-000000006", "step-000000009.writing"]
    log.write_text("")
    resumed = killed_run()
    assert steps() == [*range(6, STEPS)]
    assert not [*cache_folder().glob(".checkpoints/*")]
    log.write_text("")
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "off")
    whole = run(GPT2, policy=Harder(), checkpoint_every=0)
    assert steps() == [*range(STEPS)] and same(resumed, whole)
    assert resumed.curve.drop(columns="seconds").equals(whole.curve.drop(columns="seconds"))
    assert len(whole.curve) == STEPS and whole.curve.seconds.is_monotonic_increasing


def interrupted(monkeypatch):
    "The checkpoint of a run that stopped at step 7."
    with monkeypatch.context() as m:
        m.setenv("LM_STOP", "7")
        with pytest.raises(KeyboardInterrupt): killed_run()
    return next(cache_folder().glob(".checkpoints/*/step-000000006"))


@pytest.mark.parametrize("file", ["arrays.safetensors", "tree.json"])
@pytest.mark.parametrize("damage", ["bit", "half"])
def test_a_damaged_checkpoint_costs_a_warning_and_is_not_used(file, damage, monkeypatch):
    path = interrupted(monkeypatch) / file
    raw = bytearray(path.read_bytes())
    if damage == "half": raw = raw[:len(raw) // 2]
    else: raw[-9] ^= 4
    path.write_bytes(raw)
    with pytest.warns(UserWarning, match="damaged"): found = killed_run()
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "off")
    assert same(found, killed_run()) and not checkpoints()


def test_a_disk_that_refuses_costs_the_checkpoints_only(monkeypatch):
    cache_folder().mkdir()
    (cache_folder() / ".checkpoints").write_text("in the way")
    with pytest.warns(UserWarning, match="without checkpoints"): lm = run(LLAMA, checkpoint_every=3)
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "off")
    assert same(lm, run(LLAMA))


@pytest.mark.parametrize("config", [GPT2, LLAMA, MAMBA, own_module, partial(own_module, width=4)],
                         ids=["gpt2", "llama", "mamba", "module", "partial"])
def test_any_configuration_and_any_module_with_the_call(config):
    bpe = train_bpe(TEXTS, 270)
    lm = run(config, tokenizer=bpe, lr=1e-2, validation_texts=TEXTS[:3], validate_every=8)
    noted = lm.curve.dropna()
    assert lm.curve.loss.iloc[-1] < lm.curve.loss.iloc[0] - 0.5 and noted.validation_loss.is_monotonic_decreasing
    assert noted.step.tolist() == [7, 15]
    scores, each = lm.losses(TEXTS[:3]), lm.token_losses(TEXTS[:3])
    assert np.isclose(np.concatenate(each).mean(), noted.validation_loss.iloc[-1], atol=1e-5)
    again = TrainedLM.from_state(lm.to_state())
    assert again.fingerprint == lm.fingerprint and (again.losses(TEXTS[:3]) == scores).all()
    assert isinstance(lm.generate("The ", 5), str)


def test_seeds_decide_and_global_generators_stay_where_they_were(monkeypatch):
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "off")
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not move
    first = run(GPT2, seed=0)
    torch.rand(3), np.random.rand(3)  # noqa: NPY002
    moved = torch.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2]  # noqa: NPY002
    second, other = run(GPT2, seed=0), run(GPT2, seed=1)
    assert same(first, second) and not same(first, other)
    assert not np.array_equal(first.curve.loss, other.curve.loss)
    assert (torch.get_rng_state() == moved[0]).all()
    assert (np.random.get_state()[1] == moved[1]).all() and np.random.get_state()[2] == moved[2]  # noqa: NPY002
    assert before[0].shape == moved[0].shape


def test_one_and_two_threads_agree(monkeypatch):
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "off")
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        lm = run(GPT2, lr=1e-3)
        found.append([lm.curve.loss, lm.losses(TEXTS), lm.embeddings(TEXTS) if hasattr(lm, "embeddings") else 0])
    for one, two in zip(*found, strict=True): np.testing.assert_allclose(one, two, atol=1e-5)


@cached
def some_texts(n): return TEXTS[:n]


def test_the_second_call_is_a_hit_and_what_counts_is_in_the_key(monkeypatch):
    first, how = run_lazy().fetch()
    second, again = run_lazy().fetch()
    assert not how.hit and again.hit and same(first, second) and first.curve.equals(second.curve)
    assert first.fingerprint == second.fingerprint
    key = run_lazy().key
    assert key == run_lazy(checkpoint_every=5).key == run_lazy(device="cpu").key == run_lazy(seed=0).key
    others = [run_lazy(**{k: v}).key for k, v in {
        "seed": 1, "lr": 1e-3, "tokens": 1001, "texts": TEXTS[1:], "policy": Harder(), "packed": False, "candidates": 2,
        "shuffle": False, "tokenizer": train_bpe(TEXTS, 260), "validation_texts": TEXTS[:2], "reference": first,
        "config": GPT2, "schedule": "linear", "block": 8}.items()]
    assert len({key, *others}) == len(others) + 1
    lazy = some_texts.lazy(5)
    assert run_lazy(texts=lazy).key == run_lazy(texts=some_texts.lazy(5)).key != run_lazy(texts=some_texts.lazy(6)).key
    assert not some_texts.is_cached(5)
    assert same(run(LLAMA, texts=lazy), run(LLAMA, texts=TEXTS[:5]))
    reference = run_lazy(seed=3)
    assert run_lazy(reference=reference).key == run_lazy(reference=run_lazy(seed=3)).key
    assert same(run(LLAMA, reference=reference), first)  # nobody looks at it


def run_lazy(config=LLAMA, **options):
    "The unevaluated call."
    return train_lm.lazy(config, **{"texts": TEXTS, "tokens": 1000, "batch_size": 4, "block": 16} | options)


POLICY = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Weighs:
    weight: float = {weight}
    def init(self, n, **about): return None
    def step(self, state, signals): return state, signals["losses"] {sign} self.weight{comment}
"""


def test_a_changed_policy_class_misses(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for i, (weight, sign, comment) in enumerate([(1.0, "+", ""), (1.0, "+", "  # a comment"), (1.0, "*", ""),
                                                 (2.0, "+", "")]):
        (tmp_path / "my_policy.py").write_text(POLICY.format(weight=weight, sign=sign, comment=comment))
        os.utime(tmp_path / "my_policy.py", (i, i))
        sys.modules.pop("my_policy", None)
        importlib.invalidate_caches()
        linecache.checkcache()
        keys.append(run_lazy(policy=importlib.import_module("my_policy").Weighs()).key)
    assert keys[0] == keys[1] and len(set(keys)) == 3
    with pytest.raises(TypeError, match="policy"): run(LLAMA, policy=type("Plain", (), {"init": 1, "step": 2})())


BAD = {"tokens": 0, "batch_size": -1, "block": 0, "candidates": 1.5, "schedule": "steps", "warmup": 2, "lr": 0.0,
       "seed": -1, "weight_decay": -0.1, "validate_every": 5, "texts": "one string", "config": lambda vocab_size: None}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named(name):
    with pytest.raises(ValueError, match=f"`{name}`"): run(**{"config": LLAMA, name: BAD[name]})


def test_more_bad_arguments_are_named():
    for texts in ([], ["a", 3]):
        with pytest.raises(ValueError, match="`texts`"): run(LLAMA, texts=texts)
    with pytest.raises(ValueError, match="`block`"): run(GPT2, block=17)
    other = run(LLAMA, tokenizer=train_bpe(TEXTS, 260))
    with pytest.raises(ValueError, match="`reference`"): run(LLAMA, reference=other)
    for choice, word in (([1.0] * 3, "shape"), ([np.nan] * 4, "NaN"), ([0.0] * 4, "nothing"), ([4], "positions")):
        with pytest.raises(ValueError, match=word): run(LLAMA, policy=Says(np.array(choice)))


def test_the_call_form():
    lm = train_lm(LLAMA, TEXTS, 200, 3, block=16)
    assert isinstance(lm, TrainedLM) and lm.curve.tokens.iloc[-1] >= 200


def test_training_goes_on_from_a_model():
    start = run(LLAMA)
    same_again, further = run(start, lr=1e-9, weight_decay=0.0), run(start)
    assert all(torch.allclose(same_again.state[k], start.state[k], atol=1e-6) for k in start.state)
    assert further.fingerprint != start.fingerprint and further.curve.loss.iloc[0] < start.curve.loss.iloc[0]
    with pytest.raises(ValueError, match="`tokenizer`"): run(start, tokenizer=train_bpe(TEXTS, 260))
    with pytest.raises(ValueError, match="`block`"): run(run(GPT2), block=17)


def test_a_policy_draws_its_own_rows():
    class Draws(Says):
        rows = 2
        def draw(self, state, step, n, size, seed): return np.full(size, self.rows)

    assert np.isfinite(run(LLAMA, policy=Draws(None)).curve.loss).all()
    for rows in (10**6, 0.5):
        with pytest.raises(ValueError, match="must draw"): run(LLAMA, policy=type("D", (Draws,), {"rows": rows})(None))


def test_rows_in_place_of_texts():
    from selectbench.core.policy import Blocks
    from selectbench.zoo.lm import predict_blocks, score_blocks
    from selectbench.zoo.tokenizer import ByteTokenizer, Symbols, pack
    same = run(LLAMA, texts=pack(TEXTS, ByteTokenizer(), 16), block=99)  # the rows say how long they are
    assert all((a == b).all() for a, b in zip(same.state.values(), run(LLAMA).state.values(), strict=True))
    assert same.block == 16
    rng = np.random.default_rng(0)
    rows = Blocks(rng.integers(9, size=(6, 8)), np.where(rng.random((6, 7)) < 0.4, 0, -1))
    model = run(LLAMA, texts=rows, tokens=20, tokenizer=Symbols(9)).model()
    losses, said = score_blocks(model, rows, 2), predict_blocks(model, rows, 2)
    logits = model(torch.from_numpy(rows.tokens[:, :-1])).logits
    for j, t in np.argwhere(rows.mask):  # one row at a time, holes between targets
        assert said[j, t] == logits[j, t].argmax() and np.isclose(
            losses[j, t], -logits[j, t].log_softmax(-1)[rows.tokens[j, t + 1]].item(), atol=1e-5)
    assert not losses[~rows.mask].any() and not said[~rows.mask].any()
    for bad in (Blocks(rows.tokens + 5, rows.documents), Blocks(rows.tokens, np.full((6, 7), -1))):
        with pytest.raises(ValueError, match="`texts`"): run(LLAMA, texts=bad, tokenizer=Symbols(9))
