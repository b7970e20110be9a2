"""Pools: files verified against the manifest, faults that name the file, downloads from a server on this machine."""

import functools
import hashlib
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from selectbench.core.pool import MissingColumn, Pool
from selectbench.pools import fetch as source
from selectbench.pools.fetch import DataError, fetch, load, manifest, pools

DATA = os.environ.get("SELECTBENCH_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="needs the published files: set SELECTBENCH_DATA")

OPTIONS = [  # every published pool with every value of its main option
    *(("model_selector", {"task": t}) for t in "cola mrpc_train pacs qnli sst2 wnli".split()),
    *(("rectified_scaling_law", {"dataset": d}) for d in ("flan", "wmt19", "gigaword")),
    *(("benchbench", {"catalog": c}) for c in ("current", "old")),
    *(("routellm", {"benchmark": b}) for b in ("gsm8k", "mmlu")),
    *(("ihdp", {"replication": r}) for r in range(1, 11)),
    *(("wikitext2", {"split": s}) for s in ("valid", "test")),
    *((name, {"split": s}) for name in ("gsm8k", "headlines") for s in ("train", "test")),
    *(("llm_adapters", {"task": t, "split": s}) for t in ("boolq", "openbookqa", "ARC-Easy", "ARC-Challenge")
      for s in ("train", "test")),
    *(("llm_adapters", {"task": t}) for t in "piqa winogrande mathqa AQuA AddSub MultiArith SVAMP".split()),
    *((name, {}) for name in "lovm coda_digits qdoes tinyshakespeare gsm8k_solutions cranfield codet".split()),
]
label = lambda case: "-".join([case[0], *map(str, case[1].values())])


@pytest.fixture
def alone(monkeypatch, tmp_path):
    "No local folder, empty cache folders, nothing checked yet."
    monkeypatch.delenv("SELECTBENCH_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(source, "download_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(source, "_checked", {})
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path / "results"))
    return tmp_path


@pytest.fixture
def one_file(monkeypatch):
    "A manifest with one small file, and its content."
    content = b"".join(b"%d,%d\n" % (i, i * i) for i in range(300))
    row = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "repository": "someone/table",
           "commit": "c0ffee", "path": "data/a table.csv", "licence": "MIT"}
    table = pd.DataFrame([row], index=pd.Index(["table/squares.csv"], name="file"))
    monkeypatch.setattr(source, "manifest", lambda: table)
    return content


@pytest.fixture
def serve(monkeypatch, tmp_path):
    "A function that publishes bytes as the file's source on 127.0.0.1 and lists the requests that came."
    root = tmp_path / "web"
    requests = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

        def do_GET(self): requests.append(self.path); super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(source, "BASE_URL", f"http://127.0.0.1:{server.server_port}")

    def publish(content):
        path = root / "someone/table/c0ffee/data/a table.csv"
        path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(content)
        return requests
    yield publish
    server.shutdown(); server.server_close()


# Pool


def test_a_missing_column_names_near_ones():
    pool = Pool("p", "1", {"predictions": np.zeros((3, 2)), "y": np.zeros(3)}, 3)
    with pytest.raises(MissingColumn, match="'prediction'.*'predictions'"): pool["prediction"]
    with pytest.raises(ValueError): _ = pool.soft_predictions
    assert getattr(pool, "soft_predictions", None) is None


def test_a_pool_cannot_be_changed():
    x = np.zeros(3)
    pool = Pool("p", "1", {"y": x, "texts": ["a", "b", "c"]}, 3)
    with pytest.raises(ValueError, match="read-only"): pool.y[0] = 1
    with pytest.raises(TypeError): pool.columns["z"] = x
    with pytest.raises(AttributeError): pool.name = "q"


def test_subset_cuts_items_and_keeps_what_describes_the_whole():
    frame = pd.DataFrame({"a": [1, 2, 3]})
    pool = Pool("p", "1", {"y": np.arange(3), "models": ["m", "n", "o"], "frame": frame}, 3, shared=("models",))
    part = pool.subset([2, 0])
    assert part.y.tolist() == [2, 0] and part.models == ["m", "n", "o"] and part.frame.a.tolist() == [3, 1]
    assert part.n == 2 and part.fingerprint not in (pool.fingerprint, pool.subset([0, 2]).fingerprint)
    assert part.subset([0]).models == ["m", "n", "o"]


# The list of pools


def test_the_manifest_ships_whole_with_the_package():
    table = manifest()
    assert len(table) == 179 and table.index.is_unique and table.sha256.str.fullmatch("[0-9a-f]{64}").all()
    public = table[table.index != "coda_digits/digits_soft500.npz"]
    assert public.commit.str.fullmatch("[0-9a-f]{40}").all() and (public.path != "").all()


def test_pools_lists_every_pool_once_with_licence_and_source():
    table = pools()
    assert table.index.is_unique and (table.licence != "").all() and (table.source != "").all()
    assert {case[0] for case in OPTIONS} == set(table.index[table.kind == "published"])


def test_load_names_near_pools():
    with pytest.raises(ValueError, match="'wikitext2'"): load("wikitext")


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "iris", "diabetes"])
def test_tables_load_without_any_folder(name, alone):
    pool = load(name)
    assert pool.features.dtype == np.float32 and len(pool) == len(pool.features) and np.isfinite(pool.features).all()


def test_table_versions_are_those_of_the_content():
    assert load("digits").fingerprint == "pool:digits:9431c562ffdc"
    assert load("iris").fingerprint == "pool:iris:5caee4c15499"


def test_docstrings_are_distinct_ordered_and_versioned(alone):
    pool = load("docstrings", packages=("numpy", "pandas"))
    assert len(set(pool.texts)) == len(pool) > 1000 and min(map(len, pool.texts)) >= 100
    assert (np.diff(pool.groups) >= 0).all() and set(pool.groups.tolist()) == {0, 1} and len(pool.names) == len(pool)
    assert f"numpy{np.__version__}" in pool.version and f"pandas{pd.__version__}" in pool.version
    assert pool.version != load("docstrings", packages=("numpy",)).version
    turned = load("docstrings", packages=("pandas", "numpy"))
    assert turned.group_names == ["pandas", "numpy"] and turned.version != pool.version
    assert set(turned.texts) == set(pool.texts)
    with pytest.raises(ValueError, match="packages"): load("docstrings", packages=("numpi",))


def test_docstrings_come_from_the_cache_and_without_one_from_the_files(alone, monkeypatch):
    from selectbench.pools import text
    text._docstrings.cache_clear()
    first = load("docstrings", packages=("numpy",))
    frame, fetched = text.stack_docstrings.lazy((("numpy", np.__version__),), 100).fetch()
    assert fetched.hit and frame.texts.tolist() == first.texts
    monkeypatch.setenv("SELECTBENCH_CACHE", str(alone / "empty"))
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "readonly")
    text._docstrings.cache_clear()
    assert load("docstrings", packages=("numpy",)).texts == first.texts


@needs_data
@pytest.mark.parametrize("case", OPTIONS, ids=label)
def test_a_published_pool_loads_typed_and_documented(case):
    name, options = case
    pool = load(name, **options)
    items = [k for k in pool.columns if pool.over_items(k)]
    assert pool.name == name and len(items) >= 2 and pool.version != ""
    assert pool.about["citation"] and pool.about["source"]
    for column in pool.columns.values():
        assert isinstance(column, list | pd.DataFrame) or column.dtype.kind in "bif"
    kinds = {"y": "i", "groups": "i", "predictions": "i", "soft_predictions": "f", "responses": "f"}
    for signal, kind in kinds.items():
        if signal in pool: assert pool[signal].dtype.kind == kind and len(pool[signal]) == len(pool)
    if "texts" in pool: assert all(isinstance(t, str) for t in pool.texts)
    if "groups" in pool: assert pool.groups.max() < len(pool.group_names)
    if "class_names" in pool and "y" in pool: assert set(pool.y.tolist()) == set(range(len(pool.class_names)))
    assert pool._repr_html_().count("<tr>") == len(pool.columns) + 1


@needs_data
def test_options_give_versions_of_their_own():
    several = ("ihdp", "headlines", "llm_adapters")
    fingerprints = [load(name, **options).fingerprint for name, options in OPTIONS if name in several]
    assert len(set(fingerprints)) == len(fingerprints)


@needs_data
def test_every_file_of_the_manifest_is_there_and_intact():
    for file in manifest().index: assert fetch(file) == Path(DATA).expanduser() / file


# A local folder


def test_a_damaged_file_is_named(alone, one_file, monkeypatch):
    path = alone / "table/squares.csv"
    path.parent.mkdir(); path.write_bytes(one_file)
    monkeypatch.setenv("SELECTBENCH_DATA", str(alone))
    assert fetch("table/squares.csv") == path
    flipped = bytearray(one_file); flipped[100] ^= 1
    path.write_bytes(bytes(flipped)); os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="'table/squares.csv'.*damaged.*Replace it"): fetch("table/squares.csv")


@needs_data
def test_a_published_file_with_one_bit_flipped_is_refused_by_its_loader(alone, monkeypatch):
    file = "rectified_scaling_law/flan.csv"
    content = bytearray((Path(DATA).expanduser() / file).read_bytes()); content[1000] ^= 1
    (alone / file).parent.mkdir(); (alone / file).write_bytes(bytes(content))
    monkeypatch.setenv("SELECTBENCH_DATA", str(alone))
    with pytest.raises(DataError, match=f"'{file}'.*damaged"): load("rectified_scaling_law", dataset="flan")


def test_a_missing_file_is_named_with_what_to_do(alone, monkeypatch):
    monkeypatch.setenv("SELECTBENCH_DATA", str(alone))
    with pytest.raises(DataError, match="'gsm8k/train.jsonl' is missing.*get it from http"): load("gsm8k")
    with pytest.raises(DataError, match="'coda_digits/digits_soft500.npz' is missing.*copy it"): load("coda_digits")


def test_a_name_outside_the_manifest_is_refused_with_near_names(alone):
    with pytest.raises(ValueError, match="gsm8k/train.jsonl"): fetch("gsm8k/trian.jsonl")


def test_a_file_is_hashed_once_while_it_stays(alone, one_file, monkeypatch):
    path = alone / "table/squares.csv"
    path.parent.mkdir(); path.write_bytes(one_file)
    monkeypatch.setenv("SELECTBENCH_DATA", str(alone))
    hashed = []
    real = source.pooch.file_hash
    monkeypatch.setattr(source.pooch, "file_hash", lambda p, alg: hashed.append(p) or real(p, alg=alg))
    for _ in range(3): fetch("table/squares.csv")
    os.utime(path, ns=(5, 5)); fetch("table/squares.csv")
    assert len(hashed) == 2


# Downloads


def test_a_download_is_verified_and_kept(alone, one_file, serve):
    requests = serve(one_file)
    path = fetch("table/squares.csv")
    assert path.read_bytes() == one_file and requests == ["/someone/table/c0ffee/data/a%20table.csv"]
    assert fetch("table/squares.csv") == path and len(requests) == 1


def test_a_changed_download_is_refused_and_leaves_nothing(alone, one_file, serve):
    serve(one_file[:-1] + b"!")
    with pytest.raises(DataError, match="'table/squares.csv'.*damaged or was changed"): fetch("table/squares.csv")
    assert [p for p in (alone / "cache").rglob("*") if p.is_file()] == []


def test_a_damaged_kept_file_is_downloaded_again(alone, one_file, serve):
    requests = serve(one_file)
    fetch("table/squares.csv").write_bytes(b"damaged")
    assert fetch("table/squares.csv").read_bytes() == one_file and len(requests) == 2


def test_a_damaged_kept_file_is_not_used_when_its_source_changed_too(alone, one_file, serve):
    serve(one_file); fetch("table/squares.csv").write_bytes(b"damaged"); serve(b"other")
    with pytest.raises(DataError, match="damaged"): fetch("table/squares.csv")


def test_a_source_that_lacks_the_file_is_an_error_that_names_it(alone, one_file, serve):
    with pytest.raises(DataError, match="'table/squares.csv' could not be downloaded.*SELECTBENCH_DATA"):
        fetch("table/squares.csv")


def test_without_network_the_error_says_what_to_do(alone, one_file, monkeypatch):
    monkeypatch.setattr(source, "BASE_URL", "http://127.0.0.1:1")
    with pytest.raises(DataError, match="'table/squares.csv' could not be downloaded.*SELECTBENCH_DATA"):
        fetch("table/squares.csv")


def test_a_file_without_public_source_asks_for_the_folder(alone):
    with pytest.raises(DataError, match="no public source.*SELECTBENCH_DATA"): load("coda_digits")
