"""What the signals of a language model promise beyond the notebook: threads, batches, the cache, hub models, tasks."""
import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast  # noqa: E402

from selectbench.core.task import Task  # noqa: E402
from selectbench.signals import lm as module  # noqa: E402
from selectbench.signals.lm import (  # noqa: E402
    HubLM,
    LMEncoder,
    lm_embeddings,
    lm_gradients,
    lm_losses,
    lm_token_losses,
    rating_logits,
    text_conditional_losses,
    text_gradients,
    text_losses,
)
from selectbench.signals.text import HubModel, text_embeddings  # noqa: E402
from selectbench.zoo.lm import train_lm  # noqa: E402

WORDS = "array shape model data train loss axis index frame plot colour line sparse matrix solver 1 2 3 4 5".split()
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS, RNG.integers(1, 12))) for _ in range(24)] + [""]
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 64}
PROMPTS = ("Mark {text}\n", "{text}: 1 to 5?")

PROGRAM = """
import sys
import numpy as np, torch
from transformers import LlamaConfig
from selectbench.signals.lm import lm_embeddings, lm_gradients, lm_losses, lm_token_losses, rating_logits
from selectbench.zoo.lm import build, architecture, TrainedLM
from selectbench.zoo.tokenizer import ByteTokenizer
torch.set_num_threads(int(sys.argv[1]))
shape = architecture(LlamaConfig(**eval(sys.argv[3])), ByteTokenizer())
lm = TrainedLM(shape, build(shape, 3).state_dict(), ByteTokenizer(), None, 32)
texts = eval(sys.argv[4])
np.savez(sys.argv[2], losses=lm_losses.__wrapped__(texts, lm),
         tokens=np.concatenate(lm_token_losses.__wrapped__(texts, lm)),
         embeddings=lm_embeddings.__wrapped__(texts, lm, pooling="weighted"),
         gradients=lm_gradients.__wrapped__(texts, lm),
         ratings=rating_logits.__wrapped__(texts, [lm], prompts=eval(sys.argv[5])))
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch): monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def lm(): return trained(LlamaConfig(**TINY))


def trained(config, **options):
    "A small model of the zoo, trained for a moment, not kept."
    call = train_lm.lazy(config, TEXTS, 400, block=32, **options)
    return call.fn.__wrapped__(**call.arguments.arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A GPT-2 with random weights, and a tokenizer that begins and ends a text differently, as `save_pretrained` leaves."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    known = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = tmp_path_factory.mktemp("gpt")
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=2, n_positions=48)).save_pretrained(path)
    return path


def answers(lm, texts=TEXTS, **options):
    "name -> array, everything that is asked of `lm`."
    return {"losses": lm_losses.__wrapped__(texts, lm, **options),
            "token losses": np.concatenate(lm_token_losses.__wrapped__(texts, lm, **options)),
            "mean": lm_embeddings.__wrapped__(texts, lm, **options),
            "weighted": lm_embeddings.__wrapped__(texts, lm, pooling="weighted", **options),
            "gradients": lm_gradients.__wrapped__(texts, lm, **options),
            "exact gradients": lm_gradients.__wrapped__(texts, lm, project=None, **options),
            "ratings": rating_logits.__wrapped__(texts, [lm], prompts=PROMPTS, **options)}


def test_one_and_two_threads_agree(tmp_path):
    def run(threads):
        path = str(tmp_path / f"{threads}.npz")
        env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        given = [str(threads), path, repr(TINY), repr(TEXTS), repr(PROMPTS)]
        subprocess.run([sys.executable, "-c", PROGRAM, *given], check=True, env=env)
        return dict(np.load(path))
    one, two = run(1), run(2)
    for name in one: np.testing.assert_allclose(one[name], two[name], atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("which", ["zoo", "hub"])
def test_batches_change_nothing(lm, folder, which):
    model = lm if which == "zoo" else HubLM(HubModel(str(folder)), max_length=16)
    alone, many = answers(model, batch_size=1), answers(model)
    for name in alone:
        scale = max(1, np.abs(many[name]).max())
        np.testing.assert_allclose(alone[name], many[name], atol=1e-5 * scale, err_msg=name)
        assert np.isfinite(many[name]).all() and many[name].std() > 0


def test_a_hub_model_agrees_with_its_own_module(folder):
    hub = HubLM(HubModel(str(folder)))
    gpt, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), hub.hub.tokenizer
    assert hub.block == 48 and hub.parameters == sum(p.numel() for p in gpt.parameters())
    got = answers(hub)
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], 2]])  # it puts <s> before by itself
        gpt.zero_grad(); out = gpt(ids, labels=ids, output_hidden_states=True); out.loss.backward()
        assert abs(out.loss.item() - got["losses"][i]) < 1e-5
        exact = torch.cat([p.grad.flatten() for p in gpt.parameters()]).numpy()
        np.testing.assert_allclose(got["exact gradients"][i], exact, atol=2e-6)
        if not text: continue
        hidden, w = out.hidden_states[-1][0, 1:-1].detach().numpy(), np.arange(1, ids.shape[1] - 1)
        np.testing.assert_allclose(got["mean"][i], hidden.mean(0), atol=1e-5)
        np.testing.assert_allclose(got["weighted"][i], w @ hidden / w.sum(), atol=1e-5)
    assert np.array_equal(lm_losses(TEXTS, hub.hub), got["losses"])  # a HubModel stands for its HubLM


def test_the_windows_of_a_long_text_add_up(folder):
    gpt, hub = GPT2LMHeadModel.from_pretrained(folder).eval(), HubLM(HubModel(str(folder)), max_length=4)
    got = lm_gradients.__wrapped__(TEXTS, hub, project=None)
    for text, row in zip(TEXTS, got, strict=True):
        ids = torch.tensor([*hub.hub.tokenizer(text)["input_ids"], 2])
        rows, entropy = [ids[s: s + 5] for s in range(0, len(ids) - 1, 4)], torch.nn.functional.cross_entropy
        loss = sum(entropy(gpt(r[None, :-1]).logits[0], r[1:], reduction="sum") for r in rows)
        exact = torch.autograd.grad(loss / (len(ids) - 1), list(gpt.parameters()))
        np.testing.assert_allclose(row, torch.cat([g.flatten() for g in exact]).numpy(), atol=2e-6)


def test_a_long_prompt_loses_the_end_of_its_text_not_the_question(folder):
    hub = HubLM(HubModel(str(folder)), max_length=12)
    long, prompt = "array shape model data train loss axis index frame plot colour line", "shape {text} 1 2"
    cut = " ".join(long.split()[:8])  # 12 places: the beginning, one word before, two after, eight of the text
    got = [rating_logits.__wrapped__([t], [hub], prompts=[prompt]) for t in (long, cut, cut + " loss loss")]
    np.testing.assert_allclose(got[0], got[1], atol=1e-6)
    np.testing.assert_allclose(got[0], got[2], atol=1e-6)
    assert not np.allclose(got[0], rating_logits.__wrapped__([cut], [hub], prompts=["shape {text} 2 1"]), atol=1e-3)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_mixture_of_experts_has_gradients_too():
    lm = trained(MixtralConfig(**TINY, num_local_experts=4, sliding_window=None))
    inner, texts = lm.model(), TEXTS[:4]
    got = lm_gradients.__wrapped__(texts, lm, project=None)
    for text, row in zip(texts, got, strict=True):
        if len(text) > 31: continue
        ids = torch.tensor([[lm.tokenizer.eot, *lm.tokenizer.encode(text), lm.tokenizer.eot]])
        inner.zero_grad()
        torch.nn.functional.cross_entropy(inner(ids[:, :-1]).logits[0], ids[0, 1:]).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in inner.parameters()]
        np.testing.assert_allclose(row, torch.cat([g.flatten() for g in grads]).numpy(), atol=2e-6)


class Branching(torch.nn.Module):
    "It looks at its data to decide what to do, which vmap cannot batch."
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)

    def forward(self, ids):
        h = self.embed(ids)
        return self.head(h.relu() if int(ids.sum()) % 2 else h)


def test_what_vmap_cannot_batch_is_taken_one_by_one():
    net, weight = Branching(), torch.ones(6, 4)
    ids = torch.randint(9, (6, 5), generator=torch.Generator().manual_seed(0))
    moving = {k: p.detach() for k, p in net.named_parameters()}
    with torch.no_grad(): got = module._window_gradients(net, moving, ids, weight)
    for row, i in zip(got, ids, strict=True):
        net.zero_grad(); torch.nn.functional.cross_entropy(net(i[None, :-1])[0], i[1:], reduction="sum").backward()
        np.testing.assert_allclose(row, torch.cat([p.grad.flatten() for p in net.parameters()]).numpy(), atol=1e-6)


def test_names_choose_columns(lm):
    exact = lm_gradients.__wrapped__(TEXTS, lm, project=None)
    sizes = {k: v.numel() for k, v in lm.model().named_parameters()}
    where = np.repeat(list(sizes), list(sizes.values()))
    for names in (["model.norm.weight"], "model.layers.0.*", ("lm_head.weight", "model.embed_tokens.weight")):
        some = lm_gradients.__wrapped__(TEXTS, lm, project=None, names=names)
        wanted = [names] if isinstance(names, str) else names
        columns = [any(w == n or (n.endswith("*") and w.startswith(n[:-1])) for n in wanted) for w in where]
        np.testing.assert_allclose(some, exact[:, columns], atol=1e-6)


def test_global_generators_and_the_model_are_left_alone(lm, folder):
    hub = HubLM(HubModel(str(folder)))
    hub.model().train()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not move
    answers(lm), answers(hub)
    assert (torch.get_rng_state() == before[0]).all() and hub.model().training
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert all(p.grad is None for p in hub.model().parameters())


def task(signals, **options):
    return Task("texts", signals={"n": len(TEXTS), **signals}, evaluate=lambda selection, seed: {}, fingerprint="texts",
                options=options)


def test_a_task_of_texts_has_the_signals_of_its_model(lm):
    t = task({"texts": TEXTS, "target_texts": TEXTS[:5]}, lm=lm, project=16, raters=[lm], prompts=PROMPTS,
             encoder=LMEncoder(lm), target_tokens=300)
    assert np.array_equal(t.signal("losses"), lm_losses.__wrapped__(TEXTS, lm))
    assert t.signal("gradients").shape == (len(TEXTS), 16)
    np.testing.assert_allclose(t.signal("gradients")[:5], t.signal("target_gradients"), atol=1e-5)
    assert t.signal("conditional_losses")[:5].mean() < t.signal("losses")[:5].mean()
    assert t.signal("rating_logits").shape == (1, len(TEXTS), 2, 5)
    assert t.signal("model_sizes").tolist() == [lm.parameters]
    np.testing.assert_allclose(t.signal("embeddings"), lm_embeddings(TEXTS, lm, pooling="weighted"), atol=1e-6)
    with pytest.raises(ValueError, match="`raters`"): task({"texts": TEXTS}).signal("rating_logits")


def test_without_a_model_one_is_trained_on_the_pool():
    losses = text_losses.__wrapped__(TEXTS, tokens=2000)
    assert losses.shape == (len(TEXTS),) and np.isfinite(losses).all()
    np.testing.assert_array_equal(losses, text_losses.__wrapped__(TEXTS, tokens=2000))
    assert text_gradients.__wrapped__(TEXTS, tokens=2000, project=8).shape == (len(TEXTS), 8)


def test_a_table_with_texts_keeps_the_measures_of_tables():
    table = {"features": RNG.normal(size=(len(TEXTS), 4)).astype("f4"), "y": np.arange(len(TEXTS)) % 3, "texts": TEXTS}
    for name in ("losses", "gradients"):
        assert task(table).lazy_signal(name).fn.__name__ == f"proxy_{name}"
        assert task({"texts": TEXTS}).lazy_signal(name).fn.__name__ == f"text_{name}"


def test_results_are_kept_by_the_weights_and_hub_models_by_what_the_folder_holds(lm, folder, tmp_path):
    import shutil
    lm_losses(TEXTS, lm, batch_size=3)
    assert lm_losses.is_cached(TEXTS, lm) and not lm_losses.is_cached(TEXTS[1:], lm)
    made, found = (lm_token_losses(TEXTS, lm) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(made, found, strict=True))
    other = trained(LlamaConfig(**TINY), seed=1)
    assert not lm_losses.is_cached(TEXTS, other) and lm_losses.key(TEXTS, lm) != lm_losses.key(TEXTS, other)
    moved = shutil.copytree(folder, tmp_path / "moved")
    hub = HubLM(HubModel(str(folder)))
    assert hub.fingerprint == HubLM(HubModel(str(moved))).fingerprint != HubLM(hub.hub, max_length=7).fingerprint
    assert LMEncoder(lm).fingerprint != LMEncoder(lm, "mean").fingerprint != LMEncoder(other, "mean").fingerprint
    assert text_embeddings.key(TEXTS, encoder=LMEncoder(lm)) == text_embeddings.key(TEXTS, encoder=LMEncoder(lm))


def test_nothing_is_loaded_before_it_is_used(monkeypatch):
    import transformers
    calls = []
    def load(id, *, revision, **options): calls.append((id, revision)); raise OSError("no network")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    hub = HubModel("org/model", "0123abc")
    assert lm_losses.key(TEXTS, hub) == lm_losses.key(TEXTS, HubModel("org/model", "0123abc")) and not calls
    with pytest.raises(OSError, match="no network"): lm_losses(TEXTS, hub)
    assert calls == [("org/model", "0123abc")]


@pytest.mark.parametrize("name, call", {
    "lm": lambda lm: lm_losses(TEXTS, "gpt2"),
    "lm ": lambda lm: text_conditional_losses.__wrapped__(TEXTS, TEXTS, lm=HubLM(HubModel("org/model"))),
    "texts": lambda lm: lm_losses.__wrapped__("one string", lm),
    "texts ": lambda lm: lm_gradients.__wrapped__([], lm),
    "texts  ": lambda lm: rating_logits.__wrapped__([], [lm]),
    "texts   ": lambda lm: rating_logits.__wrapped__(["a", 3], [lm]),
    "project": lambda lm: lm_gradients(TEXTS, lm, project=0),
    "names": lambda lm: lm_gradients(TEXTS, lm, names=["model.norm.weight", "no.such"]),
    "names ": lambda lm: lm_gradients(TEXTS, lm, names=[]),
    "pooling": lambda lm: lm_embeddings(TEXTS, lm, pooling="max"),
    "pooling ": lambda lm: LMEncoder(lm, "max"),
    "raters": lambda lm: rating_logits(TEXTS, []),
    "raters ": lambda lm: rating_logits(TEXTS, ["gpt2"]),
    "prompts": lambda lm: rating_logits(TEXTS, [lm], prompts=["no text"]),
    "prompts ": lambda lm: rating_logits(TEXTS, [lm], prompts="{text}"),
    "prompts  ": lambda lm: rating_logits(TEXTS, [lm], prompts=["please mark this text, and be strict: {text}"]),
    "ratings": lambda lm: rating_logits(TEXTS, [lm], prompts=PROMPTS, ratings=("1", "11")),
    "hub": lambda lm: HubLM("gpt2"),
    "max_length": lambda lm: HubLM(HubModel("gpt2"), max_length=0),
}.items())
def test_a_bad_argument_is_named(lm, name, call):
    with pytest.raises(ValueError, match=f"`{name.strip()}`"): call(lm)


def test_a_tokenizer_without_an_end_is_refused():
    from tokenizers import Tokenizer, models
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="begins or ends"): module._HubTokenizer(bare)
