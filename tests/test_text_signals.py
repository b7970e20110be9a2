"""What the embeddings of texts promise beyond the notebook: threads, the cache, folders, the choice of a task."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from selectbench.core.task import Task
from selectbench.signals.text import Encoder, HubModel, encode, hashed_vectors, target_text_embeddings, text_embeddings

WORDS = "array shape model data train loss axis index frame plot colour line sparse matrix solver".split()
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS, RNG.integers(2, 30))) for _ in range(60)]

PROGRAM = """
import sys
import numpy as np
from selectbench.pools.text import stack_docstrings
from selectbench.signals.text import hashed_vectors
texts = stack_docstrings.__wrapped__((("numpy", "0"),), 100).texts.tolist()[:500]
np.savez(sys.argv[1], pool=hashed_vectors(texts, texts), target=hashed_vectors(texts[:400], texts[400:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A BERT with random weights and its tokenizer, as `save_pretrained` leaves them."
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    path = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=64, max_position_embeddings=24)).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch): monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path / "cache"))


def task(signals, **options):
    return Task("texts", signals={"n": len(TEXTS), **signals}, evaluate=lambda selection, seed: {}, fingerprint="texts",
                options=options)


def in_hand(folder):
    hub = HubModel(str(folder))
    return hub.model.cpu(), hub.tokenizer


def test_hashed_vectors_agree_on_one_and_two_threads(tmp_path):
    def start(threads):
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        env = os.environ | dict.fromkeys(names, str(threads))
        return subprocess.Popen([sys.executable, "-c", PROGRAM, path(threads)], env=env)
    path = lambda threads: str(tmp_path / f"{threads}.npz")
    assert [running.wait() for running in (start(1), start(2))] == [0, 0]
    one, two = (dict(np.load(path(threads))) for threads in (1, 2))
    for name in one: np.testing.assert_allclose(one[name], two[name], atol=1e-5, rtol=1e-5, err_msg=name)


def test_an_encoder_agrees_on_one_and_two_threads(folder):
    import torch
    model, tokenizer = in_hand(folder)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(encode(TEXTS, model, tokenizer))
    finally: torch.set_num_threads(before)
    np.testing.assert_allclose(*made, atol=1e-5, rtol=1e-5)


def test_a_task_with_texts_alone_has_embeddings_of_them():
    t = task({"texts": TEXTS, "target_texts": TEXTS[:5]}, dim=8)
    assert np.array_equal(t.signal("embeddings"), hashed_vectors(TEXTS, TEXTS, dim=8))
    assert np.allclose(t.signal("target_embeddings"), t.signal("embeddings")[:5], atol=1e-6)
    assert t.lazy_signal("embeddings").key == text_embeddings.key(TEXTS, dim=8)  # a study hands this to its cells
    with pytest.raises(ValueError, match="target_embeddings"): task({"texts": TEXTS}).signal("target_embeddings")


def test_the_measure_of_tables_stands_beside_it():
    table = {"features": RNG.normal(size=(60, 4)).astype("f4"), "y": np.arange(60) % 3}
    for signals in (table, {**table, "texts": TEXTS}):
        assert task(signals).lazy_signal("embeddings").fn.__name__ == "proxy_embeddings"
    for more in ((), ("y",), ("features",)):
        signals = {"texts": TEXTS} | {name: table[name] for name in more}
        assert task(signals).lazy_signal("embeddings").fn.__name__ == "text_embeddings"


def test_global_generators_are_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not move
    hashed_vectors(TEXTS, TEXTS, dim=5)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_nothing_is_loaded_before_it_is_used(monkeypatch):
    import transformers
    calls = []
    for auto in ("AutoModel", "AutoTokenizer"):
        def load(id, *, revision, auto=auto):
            calls.append((auto, id, revision))
            raise OSError("no network")
        monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", load)
    hub = HubModel("org/encoder", "0123abc")
    key = text_embeddings.key(TEXTS, encoder=Encoder(hub))
    assert key == text_embeddings.key(TEXTS, encoder=Encoder(HubModel("org/encoder", "0123abc")))
    assert key != text_embeddings.key(TEXTS, encoder=Encoder(HubModel("org/encoder", "main"))) and not calls
    with pytest.raises(OSError, match="no network"): text_embeddings(TEXTS, encoder=hub)
    assert calls == [("AutoModel", "org/encoder", "0123abc")]


def test_importing_the_module_loads_no_torch():
    program = "import sys, selectbench.signals.text; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_folder_is_known_by_what_is_in_it(folder, tmp_path):
    import shutil
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert HubModel(str(moved)).fingerprint == HubModel(str(folder)).fingerprint
    E = text_embeddings(TEXTS, encoder=HubModel(str(folder)))
    assert E.shape == (60, 32) and text_embeddings.is_cached(TEXTS, encoder=HubModel(str(moved)))
    np.testing.assert_allclose(E, encode(TEXTS, *in_hand(folder)), atol=1e-5)
    assert np.allclose(E[:4], target_text_embeddings(TEXTS, TEXTS[:4], encoder=HubModel(str(moved))), atol=1e-5)
    config = moved / "config.json"
    config.write_text(config.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-05'))
    assert HubModel(str(moved)).fingerprint != HubModel(str(folder)).fingerprint


def test_texts_longer_than_the_model_are_cut_and_padding_changes_nothing(folder):
    import torch
    model, tokenizer = in_hand(folder)
    long = ["array " * 100, "shape", *TEXTS[:8]]
    for batch_size in (1, 3, 10):
        E = encode(long, model, tokenizer, batch_size=batch_size)
        for text, row in zip(long, E, strict=True):
            ids = torch.tensor([tokenizer(text)["input_ids"][:24]])
            with torch.no_grad(): alone = model(input_ids=ids).last_hidden_state[0].mean(0).numpy()
            np.testing.assert_allclose(row, alone, atol=1e-5)


def test_encoding_leaves_the_mode_of_every_part_and_ignores_dropout(folder):
    model, tokenizer = in_hand(folder)
    before = encode(TEXTS, model, tokenizer)
    model.train(); model.embeddings.eval()
    assert np.array_equal(before, encode(TEXTS, model, tokenizer))
    assert model.training and model.encoder.training and not model.embeddings.training


def test_what_changes_an_encoder_changes_its_fingerprint(folder):
    import torch
    model, tokenizer = in_hand(folder)
    seen = [Encoder(model, tokenizer).fingerprint, Encoder(model, tokenizer, "last").fingerprint,
            Encoder(model, tokenizer, max_length=7).fingerprint]
    assert Encoder(*in_hand(folder)).fingerprint == seen[0]
    tokenizer.add_tokens(["hessian"])
    seen.append(Encoder(model, tokenizer).fingerprint)
    with torch.no_grad(): model.embeddings.LayerNorm.bias[3] += 1e-6
    seen.append(Encoder(model, tokenizer).fingerprint)
    assert len(set(seen)) == 5


@pytest.mark.parametrize("name, call", {
    "texts": lambda m, t: text_embeddings("one string"),
    "texts ": lambda m, t: text_embeddings(["", " a "]),
    "texts  ": lambda m, t: text_embeddings(["word", 3]),
    "texts   ": lambda m, t: encode([], m, t),
    "texts    ": lambda m, t: encode(["", ""], m, t),
    "target_texts": lambda m, t: target_text_embeddings(TEXTS, "one string"),
    "target_texts ": lambda m, t: target_text_embeddings(TEXTS, []),
    "dim": lambda m, t: text_embeddings(TEXTS, dim=0),
    "ngrams": lambda m, t: text_embeddings(TEXTS, ngrams=0),
    "buckets": lambda m, t: text_embeddings(TEXTS, buckets=0),
    "encoder": lambda m, t: text_embeddings(TEXTS, encoder="bert-base-uncased"),
    "pooling": lambda m, t: Encoder(m, t, "max"),
    "pooling ": lambda m, t: encode(TEXTS, m, t, pooling="max"),
    "max_length": lambda m, t: Encoder(m, t, max_length=0),
    "batch_size": lambda m, t: encode(TEXTS, m, t, batch_size=0),
    "tokenizer": lambda m, t: Encoder(m),
    "model": lambda m, t: Encoder("bert-base-uncased", t),
    "id": lambda m, t: HubModel(""),
    "revision": lambda m, t: HubModel("org/encoder", None),
}.items())
def test_a_bad_argument_is_named(folder, name, call):
    with pytest.raises(ValueError, match=f"`{name.strip()}`"): call(*in_hand(folder))
