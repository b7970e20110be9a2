"""The cache under faults: what people trust with GPU days is tested by what goes wrong, not by round trips."""

import errno
import functools
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import tokenize
import types
import warnings
from importlib import import_module
from pathlib import Path

import cache_child
import numpy as np
import pandas as pd
import pytest

from selectbench.core import cache, codec, digest
from selectbench.core.cache import (
    CacheError,
    CacheMiss,
    CacheWarning,
    cache_entries,
    cached,
    export_cache,
    gc,
    import_cache,
    verified,
)

HERE = Path(__file__).parent
ROOT = HERE.parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    "An empty cache for each test."
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SELECTBENCH_CACHE_MODE", raising=False)
    return tmp_path / "cache"


def child(*args):
    "Start this test's helper in another process."
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(HERE / "cache_child.py"), *args], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def quiet(call):
    "(value, how) of a call that must not warn."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call.fetch()


def right(value, n=1000):
    return value["rows"].tolist() == list(range(n)) and value["squares"][-1] == (n - 1) ** 2

# ---------------------------------------------------------------------------------------------- killed while writing


@pytest.mark.parametrize("point", cache_child.KILLS)
def test_sigkill_leaves_a_whole_entry_or_none(point, folder):
    p = child("kill", point)
    p.communicate(timeout=60)
    assert p.returncode == -9, "the fault did not happen"
    call = cache_child.table.lazy(1000)
    whole = call.folder.exists()
    if whole: verified(call.folder)
    assert whole == (point in ("just_after_the_rename", "at_the_last_sync"))
    value, how = quiet(call)
    assert right(value) and how.hit == whole
    gc(10**9)
    assert not list((folder / ".tmp").iterdir()), "what the killed process left was not swept"


@pytest.mark.parametrize("point", ["before_the_rename", "just_after_the_rename", "within_the_meta_data"])
def test_sigkill_while_replacing_a_damaged_entry(point):
    call = cache_child.table.lazy(1000)
    call.get()
    flip(next(call.folder.glob("*.npy")))
    child("rewrite", point).communicate(timeout=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        assert right(call.get())
    assert quiet(call)[1].hit

# ---------------------------------------------------------------------------------------------- damaged


def flip(path, at=-5):
    "Flip one bit."
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


def truncate(path): path.write_bytes(path.read_bytes()[:-20])


DAMAGE = {
    "truncated_payload": lambda f: truncate(f / "a0.npy"),
    "empty_payload": lambda f: (f / "a0.npy").write_bytes(b""),
    "flipped_payload": lambda f: flip(f / "a0.npy"),
    "flipped_payload_header": lambda f: flip(f / "a0.npy", 12),
    "missing_payload": lambda f: (f / "a0.npy").unlink(),
    "swapped_payloads": lambda f: shutil.copy(f / "a1.npy", f / "a0.npy"),
    "flipped_structure": lambda f: flip(f / "value.json"),
    "missing_structure": lambda f: (f / "value.json").unlink(),
    "flipped_meta": lambda f: flip(f / "meta.json", 40),
    "truncated_meta": lambda f: truncate(f / "meta.json"),
    "missing_meta": lambda f: (f / "meta.json").unlink(),
    "meta_not_text": lambda f: (f / "meta.json").write_bytes(b"\xff\xfe\x00"),
    "foreign_payload": lambda f: (f / "a9.npy").write_bytes(b"x"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entry_is_recomputed_with_a_warning(damage):
    call = cache_child.table.lazy(1000)
    call.get()
    DAMAGE[damage](call.folder)
    with pytest.warns(CacheWarning, match="damaged"): value, how = call.fetch()
    assert right(value) and not how.hit
    value, how = quiet(call)
    assert right(value) and how.hit


def test_every_single_flipped_bit_of_a_small_entry_is_seen():
    call = cache_child.table.lazy(3)
    call.get()
    for path in sorted(call.folder.glob("*.*")):
        raw = path.read_bytes()
        for at in range(0, len(raw), 7):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:])
            with pytest.raises(ValueError): verified(call.folder)
        path.write_bytes(raw)
    verified(call.folder)


def test_entry_of_another_call_in_its_place_is_not_returned():
    a, b = cache_child.table.lazy(3), cache_child.table.lazy(4)
    a.get()
    shutil.copytree(a.folder, b.folder)
    with pytest.warns(CacheWarning, match="another call"): assert right(b.get(), 4)


def test_damaged_entry_in_readonly_mode_is_a_miss(monkeypatch):
    call = cache_child.table.lazy(1000)
    call.get()
    flip(call.folder / "a0.npy")
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "readonly")
    with pytest.warns(CacheWarning), pytest.raises(CacheMiss): call.get()

# ---------------------------------------------------------------------------------------------- two at once


def test_two_processes_compute_a_missing_key_once(tmp_path):
    both = [child("count", str(tmp_path)) for _ in range(2)]
    hits = [json.loads(p.communicate(timeout=60)[0]) for p in both]
    assert (tmp_path / "ran").read_text() == "ran\n" and sorted(hits) == [False, True]


def test_two_threads_compute_a_missing_key_once(tmp_path):
    both = [threading.Thread(target=cache_child.counted, args=(7, str(tmp_path))) for _ in range(2)]
    for t in both: t.start()
    for t in both: t.join()
    assert (tmp_path / "ran").read_text() == "ran\n"

# ---------------------------------------------------------------------------------------------- nowhere to write


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    "A disk of 64 kB; skips where one cannot be mounted."
    disk = tmp_path / "disk"
    disk.mkdir()
    try: done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    except OSError: pytest.skip("there is no mount command")
    if done.returncode: pytest.skip("mounting a small disk needs root")
    monkeypatch.setenv("SELECTBENCH_CACHE", str(disk / "cache"))
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def not_kept(call, match, n):
    "The result is right, the warning is clear, no piece of an entry is left."
    with pytest.warns(CacheWarning, match=match) as said: value, how = call.fetch()
    assert right(value, n) and not how.hit and len(said) == 1 and "cache_child.table" in str(said[0].message)
    assert not call.folder.exists()


def test_full_disk_warns_and_returns_the_result(small_disk):
    not_kept(cache_child.table.lazy(100_000), "[Nn]o space left", 100_000)
    assert not list((small_disk / "cache" / ".tmp").iterdir())
    assert right(quiet(cache_child.table.lazy(100))[0], 100), "the disk is usable again"


@pytest.mark.parametrize("where", ["np.save", "os.fsync", "os.rename", "tempfile.mkdtemp"])
def test_failing_write_warns_and_returns_the_result(where, monkeypatch):
    def full(*_a, **_k): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(where.replace("np.", "numpy."), full)
    not_kept(cache_child.table.lazy(50), "No space left", 50)


@pytest.mark.parametrize("error", [RuntimeError("inner"), UnicodeError("odd"), ValueError("format")])
@pytest.mark.parametrize("where", ["Writer.write", "read_value"])
def test_any_failure_of_a_format_warns_and_returns_the_result(error, where, monkeypatch):
    def fail(*_a, **_k): raise error
    owner, _, name = where.rpartition(".")
    monkeypatch.setattr(getattr(cache, owner) if owner else cache, name, fail)
    not_kept(cache_child.table.lazy(50), type(error).__name__, 50)


def test_unwritable_folder_warns_and_returns_the_result(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file, not a folder")
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path / "file" / "cache"))
    not_kept(cache_child.table.lazy(50), "cannot be written", 50)


def test_result_that_only_pickle_could_hold_warns_and_is_returned():
    @cached
    def thing(): return [threading.Lock]
    with pytest.warns(CacheWarning, match="pickle"): assert thing() == [threading.Lock]

# ---------------------------------------------------------------------------------------------- source

LAB = {
    "lab": """
        import numpy as np
        import shelf
        from other import outer, wrapped
        from selectbench.core.cache import cached
        FACTOR = 3
        scale = 2.0
        weights = np.array([1., 2.])
        TABLE = {"a": 1}
        memo = {1: 2}
        _KNOWN: dict = {}
        @cached
        def below(x): return x
        def helper(x, y=FACTOR): return outer(x) + FACTOR * scale + weights[0] + TABLE["a"] + wrapped(x) + below(1)
        def counter(): global calls; calls = calls + 1; return calls
        calls = 0
        def make(k):
            def inner(x): return x * k
            return inner
        by_closure = make(5)
        @cached
        def f(x):
            "Says something."
            from within import lazily
            memo[x] = 1; _KNOWN[x] = 1; counter()
            # a comment
            return helper(x) + lazily(x) + shelf.thing(x) + by_closure(x) + shelf.LEVEL + Kind().value()
        class Base:
            rate = 1
            def deep(self): return 1
        class Kind(Base):
            "A class."
            def value(self): return self.deep()
    """,
    "other": """
        import functools
        from deeper import inner
        def twice(fn):
            @functools.wraps(fn)
            def run(x): return 2 * fn(x)
            return run
        @twice
        def wrapped(x): return x
        def outer(x): return inner(x)
    """,
    "deeper": "import functools\n@functools.lru_cache(1)\ndef inner(x): return x + 1\n",
    "within": "def lazily(x): return x\n",
    "shelf": "LEVEL = 1\ndef thing(x): return x\n",
}
FRESH = itertools.count()


def lab_key(tmp_path, change=None, use=lambda lab: None):
    "The key of lab.f(1), with (module, old, new) changed; a fresh import each time."
    place = tmp_path / f"lab{next(FRESH)}"
    place.mkdir()
    for name, text in LAB.items():
        text = textwrap.dedent(text)
        if change and change[0] == name:
            assert change[1] in text
            text = text.replace(change[1], change[2])
        (place / f"{name}.py").write_text(text)
    sys.path.insert(0, str(place))
    try:
        lab = import_module("lab")
        use(lab)
        return lab.f.key(1)
    finally:
        sys.path.remove(str(place))
        for name in LAB: sys.modules.pop(name, None)


MISSES = {
    "function_body": ("lab", "return helper(x) +", "return helper(x) -"),
    "helper": ("lab", "return outer(x) +", "return outer(x) -"),
    "helper_of_a_helper_in_another_module": ("deeper", "x + 1", "x + 2"),
    "helper_imported_in_the_body": ("within", "return x", "return -x"),
    "helper_reached_as_an_attribute": ("shelf", "return x", "return -x"),
    "wrapper_of_a_helper": ("other", "2 * fn(x)", "3 * fn(x)"),
    "decorator_of_a_helper": ("other", "@twice\n", ""),
    "decorator_from_a_library": ("deeper", "lru_cache(1)", "lru_cache(2)"),
    "upper_case_constant": ("lab", "FACTOR = 3", "FACTOR = 4"),
    "lower_case_constant": ("lab", "scale = 2.0", "scale = 2.5"),
    "small_array": ("lab", "[1., 2.]", "[1., 3.]"),
    "upper_case_dict": ("lab", '{"a": 1}', '{"a": 2}'),
    "constant_of_a_module": ("shelf", "LEVEL = 1", "LEVEL = 2"),
    "closure": ("lab", "make(5)", "make(6)"),
    "base_class": ("lab", "def deep(self): return 1", "def deep(self): return 2"),
    "class_attribute": ("lab", "rate = 1", "rate = 2"),
    "version": ("lab", "@cached\ndef f", "@cached(version=2)\ndef f"),
    "version_of_a_cached_helper": ("lab", "@cached\ndef below", "@cached(version=2)\ndef below"),
    "string": ("lab", 'TABLE["a"]', "TABLE['a' 'b']"),
}
HITS = {
    "comment": ("lab", "# a comment", "# another, longer\n    # and one more"),
    "docstring": ("lab", '"Says something."', '"""Says it\n\n    otherwise."""'),
    "docstring_of_a_class": ("lab", '"A class."', '"The class."'),
    "blank_lines": ("lab", "# a comment", "\n\n"),
    "memory": ("lab", "memo = {1: 2}", "memo = {3: 4}"),
    "counter": ("lab", "\ncalls = 0", "\ncalls = 5"),
    "what_is_not_reached": ("shelf", "def thing", "def unused(x): return 7\ndef thing"),
    "line_breaks_in_brackets": ("lab", "outer(x)", "outer(\n        x)"),
}


@pytest.mark.parametrize("what", MISSES)
def test_changed_source_misses(what, tmp_path): assert lab_key(tmp_path, MISSES[what]) != lab_key(tmp_path)


@pytest.mark.parametrize("what", HITS)
def test_change_without_meaning_hits(what, tmp_path): assert lab_key(tmp_path, HITS[what]) == lab_key(tmp_path)


def test_key_is_stable_while_functions_fill_their_memory(tmp_path):
    def use(lab): lab.f.key(1); lab.f(1); lab.f(2)
    assert lab_key(tmp_path, use=use) == lab_key(tmp_path)


PATCHES = {
    "global": lambda lab: setattr(lab, "helper", lambda x: 0),
    "constant": lambda lab: setattr(lab, "scale", 9.0),
    "module_attribute": lambda lab: setattr(lab.shelf, "thing", lambda x: 0),
    "imported_in_the_body": lambda lab: setattr(sys.modules["within"], "lazily", lambda x: 0),
    "array_in_place": lambda lab: lab.weights.__setitem__(0, 7),
    "dict_in_place": lambda lab: lab.TABLE.update(a=7),
    "closure": lambda lab: lab.by_closure.__closure__[0].__setattr__("cell_contents", 9),
    "method": lambda lab: setattr(lab.Kind, "value", lambda self: 0),
    "new_method": lambda lab: setattr(lab.Kind, "deep", lambda self: 0),
    "far_helper": lambda lab: setattr(sys.modules["deeper"], "inner", lambda x: 0)
    or setattr(sys.modules["other"], "inner", lambda x: 0),
}


@pytest.mark.parametrize("what", PATCHES)
def test_memo_of_source_digests_sees_a_change_at_run_time(what, tmp_path):
    def use(lab): lab.f.key(1); PATCHES[what](lab)
    assert lab_key(tmp_path, use=use) != lab_key(tmp_path)


def test_function_without_source_is_refused():
    space = {"cached": cached}
    exec("def f(x): return x", space)
    with pytest.raises(TypeError, match="source of f"): cached(space["f"]).key(1)


def test_attribute_names_are_no_globals():
    space = {"__name__": "lab", "mean": 1}
    one = types.FunctionType((lambda x: x.mean()).__code__, {**space, "mean": 1})
    two = types.FunctionType(one.__code__, {**space, "mean": 2})
    assert digest.reached(one) == digest.reached(two)


def test_relative_import_is_the_absolute_one(tmp_path, monkeypatch):
    keys = []
    for i, line in enumerate(["from .x import y", "from pack.sub.x import y"]):
        place = tmp_path / str(i) / "pack" / "sub"
        place.mkdir(parents=True)
        (place.parent / "__init__.py").write_text("")
        (place / "__init__.py").write_text("")
        (place / "x.py").write_text("def y(): return 1")
        (place / "z.py").write_text(f"def f():\n    {line}\n    return y()\n")
        with monkeypatch.context() as m:
            m.syspath_prepend(tmp_path / str(i))
            keys.append(digest.reached(import_module("pack.sub.z").f))
        for name in [n for n in sys.modules if n.split(".")[0] == "pack"]: del sys.modules[name]
    assert keys[0] == keys[1] and "pack.sub.x.y" in dict(keys[0])

# ---------------------------------------------------------------------------------------------- notebook and package

def exports_cached(path):
    "True where an exported cell has a cached function; others are the notebook's own."
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"]]
    return any(c.startswith("#| export") and "\n@cached" in c for c in cells)


NOTEBOOKS = [p for p in sorted((ROOT / "nbs").glob("*/*.ipynb")) if exports_cached(p) and p.stem != "cache"]


def package_keys(path):
    "What cache_notebook.py prints, of the exported module."
    module = import_module(f"selectbench.{path.parent.name}.{path.stem}")
    found = [f for f in vars(module).values() if isinstance(f, cache.CachedFunction)]
    return {f.label: [f.version, digest.source_digest(f.__wrapped__)] for f in found if f.__module__ == module.__name__}


@functools.cache
def notebook_keys(how, *paths):
    "What cache_notebook.py says of each notebook."
    out = subprocess.run([sys.executable, str(HERE / "cache_notebook.py"), how, *map(str, paths)], capture_output=True,
                         text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert not out.returncode, out.stderr
    return json.loads(out.stdout)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_notebook_in_a_shell_and_package_share_keys(path):
    keys = notebook_keys("shell", *NOTEBOOKS)[str(path)]
    assert keys == package_keys(path) != {}


def test_notebook_in_a_kernel_and_package_share_keys():
    path = ROOT / "nbs/core/study.ipynb"
    keys = notebook_keys("kernel", path)[str(path)]
    assert keys == package_keys(path) and "selectbench.core.study.study_cell" in keys

# ---------------------------------------------------------------------------------------------- Python versions


def fancy(x, n=3):
    "A docstring."
    from selectbench.core import oracle  # a comment
    return f"{x!r:>{n}} {'a' + f'{n}'}" "plain", rf"\{x}", oracle.Oracle, lambda: x


GOLDEN = "62895fa8ce3a8ea1"  # first digits of the digest of `fancy`'s text, the same under every Python


def test_source_text_is_the_same_under_every_python():
    assert digest.digest(digest.code_text(fancy.__code__))[:len(GOLDEN)] == GOLDEN


def test_f_strings_in_pieces_are_one_token(monkeypatch):
    source = "x = f'{a}' + f\"{b['c']}\"\n"
    T = types.SimpleNamespace
    names = {90: "FSTRING_START", 91: "FSTRING_MIDDLE", 92: "FSTRING_END"}
    real = list(tokenize.generate_tokens(io.StringIO(source).readline))
    if hasattr(tokenize, "FSTRING_START"): pytest.skip("this Python makes the pieces itself")
    pieces = []
    for t in real:
        if t.type != tokenize.STRING: pieces.append(t); continue
        (line, a), (_, b) = t.start, t.end
        pieces += [T(type=90, string="f'", start=(line, a), end=(line, a + 2)),
                   T(type=tokenize.OP, string="{", start=(line, a + 2), end=(line, a + 3)),
                   T(type=91, string="?", start=(line, a + 3), end=(line, b - 1)),
                   T(type=92, string="'", start=(line, b - 1), end=(line, b))]
    whole = list(digest._tokens(source))
    monkeypatch.setattr(digest.tokenize, "tok_name", {**tokenize.tok_name, **names})
    monkeypatch.setattr(digest.tokenize, "generate_tokens", lambda _: iter(pieces))
    assert list(digest._tokens(source)) == whole

# ---------------------------------------------------------------------------------------------- arguments


@cached
def ask(x, y=1, *, device="cpu", n_jobs=1, threads=1, folder=None): return 1


A = np.arange(6.)
DIFFERENT = {
    "shape": (A, A.reshape(2, 3)),
    "dtype": (A, A.view("i8")),
    "fields": (np.zeros(2, [("a", "f4"), ("b", "f4")]), np.zeros(2, [("b", "f4"), ("a", "f4")])),
    "mask": (np.ma.array([1, 2], mask=[0, 0]), np.ma.array([1, 2], mask=[0, 1])),
    "reordered_columns": (pd.DataFrame({"a": A, "b": A}), pd.DataFrame({"b": A, "a": A})),
    "reordered_rows": (pd.Series([1, 2], index=[0, 1]), pd.Series([1, 2], index=[1, 0])),
    "column_index_name": (pd.DataFrame({"a": A}), pd.DataFrame({"a": A}).rename_axis(columns="z")),
    "order_of_categories": (pd.Series(pd.Categorical(["a"], ["a", "b"])), pd.Series(pd.Categorical(["a"], ["b", "a"]))),
    "number_type": (1, 1.0), "bool": (1, True), "text": (1, "1"), "list": ([1], (1,)), "nesting": ([1, [2]], [[1], 2]),
    "function": (np.mean, np.sum), "partial": (functools.partial(max, 1), functools.partial(max, 2)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_different_arguments_miss(what):
    a, b = DIFFERENT[what]
    assert ask.key(a) != ask.key(b)


def test_layout_in_memory_does_not_count():
    assert ask.key(np.asfortranarray(A.reshape(2, 3))) == ask.key(A.reshape(2, 3))


def test_argument_order_and_defaults_do_not_count():
    assert ask.key(y=2, x=1) == ask.key(1, 2) == ask.key(x=1, y=2)
    assert ask.key(1) == ask.key(1, 1) != ask.key(1, 2)


def test_device_threads_and_folder_do_not_count():
    assert ask.key(1) == ask.key(1, device="cuda", n_jobs=8, threads=2, folder="/elsewhere")


def test_one_changed_weight_or_attribute_of_a_model_misses():
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(.1))
    keys = [ask.key(net), ask.key(net)]
    with torch.no_grad(): net[0].weight[0, 0] += 1e-6
    keys.append(ask.key(net))
    keys.append(ask.key(net.eval()))
    net[0].scale = 2.0
    keys.append(ask.key(net))
    net.register_buffer("shift", torch.ones(1), persistent=False)
    keys.append(ask.key(net))
    assert keys[0] == keys[1] and len(set(keys)) == 5


def test_fitted_estimator_and_generator_have_no_key():
    from sklearn.linear_model import LogisticRegression
    model = LogisticRegression()
    assert ask.key(model) != ask.key(LogisticRegression(C=2))
    with pytest.raises(TypeError, match="`x`"): ask.key(model.fit([[0.], [1.]], [0, 1]))
    with pytest.raises(TypeError, match="`x`"): ask.key(np.random.default_rng(0))


@cached
def made(n): return np.arange(n, dtype="f8")


@cached
def many(n): return {"a": np.arange(n, dtype="f8")}


@pytest.mark.parametrize("n", [10, 300_000])
def test_result_is_keyed_by_origin_and_a_changed_copy_by_content(n):
    x = made(n)
    assert digest._made_by(x) == made.key(n) and not x.flags.writeable
    with pytest.raises(ValueError): x.flags.writeable = True
    copy = x.copy()
    assert ask.key(copy) == ask.key(np.arange(n, dtype="f8")) != ask.key(x)
    copy[0] = 5
    copy.flags.writeable = False
    assert ask.key(copy) not in (ask.key(x), ask.key(np.arange(n, dtype="f8")))


def test_result_read_in_another_form_loses_its_origin():
    x = made(12)
    key = ask.key(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy discourages it; it works
        x.shape = (3, 4)
    assert ask.key(x) != key and digest._made_by(x) is None


def test_array_that_can_be_made_writable_is_never_keyed_by_origin():
    x = np.arange(3.)
    x.flags.writeable = False
    digest.remember(x, "origin")
    before = ask.key(x)
    x.flags.writeable = True
    x[0] = 9
    x.flags.writeable = False
    assert ask.key(x) != before


def test_array_inside_another_result_is_keyed_by_content():
    assert ask.key(many(5)["a"]) == ask.key(np.arange(5.))


def test_unevaluated_call_is_keyed_without_evaluating(tmp_path):
    later = cache_child.counted.lazy(1, str(tmp_path))
    same, other = cache_child.counted.lazy(1, "elsewhere"), cache_child.counted.lazy(2, "")
    assert ask.key(later) == ask.key(same) != ask.key(other)
    assert not (tmp_path / "ran").exists() and not ask.is_cached(later)


def test_key_of_a_small_call_takes_less_than_a_millisecond():
    ask.key(1)
    start = time.process_time()
    for i in range(200): ask.key(i, {"k": 2.5})
    assert (time.process_time() - start) / 200 < 1e-3

# ---------------------------------------------------------------------------------------------- what may not be opened


class Trap:
    "Touches a file when it is unpickled."
    def __init__(self, path): self.path = path

    def __reduce__(self): return Path.touch, (self.path,)


def forge(call, files, tree):
    "Put other content into an entry, with checksums that fit."
    call.get()
    for p in call.folder.iterdir():
        if p.name not in ("meta.json", "value.json"): p.unlink()
    for name, raw in files.items(): (call.folder / name).write_bytes(raw)
    (call.folder / "value.json").write_text(json.dumps(tree))
    meta = json.loads((call.folder / "meta.json").read_text())
    meta["payloads"] = {n: cache._sha256(call.folder / n) for n in ["value.json", *files]}
    (call.folder / "meta.json").write_text(json.dumps(meta | {"checksum": cache._checksum(meta)}))


def pickled(path):
    raw = io.BytesIO()
    np.save(raw, np.array([Trap(path)], dtype=object), allow_pickle=True)
    return raw.getvalue()


FORGED = {
    "npy_of_objects": lambda p: ({"a0.npy": pickled(p)}, {"$array": "a0.npy"}),
    "pickle_by_name": lambda p: ({"a0.pkl": pickled(p)}, {"$array": "a0.pkl"}),
    "torch_file": lambda p: ({"a0.pt": pickled(p)}, {"$tensor": "a0"}),
    "pickle_named_as_a_table": lambda p: ({"a0.parquet": pickled(p)}, {"$array": "a0.parquet"}),
    "path_outside": lambda p: ({}, {"$array": "../a0.npy"}),
    "object_of_another_package": lambda p: ({}, {"$object": "pathlib:Path", "state": str(p)}),
    "function_as_an_object": lambda p: ({}, {"$object": "selectbench.core.cache:gc", "state": 0}),
    "borrowed_class": lambda p: ({}, {"$object": "selectbench.core.cache:Path", "state": str(p)}),
}


SAYS = {"object_of_another_package": "not of this package", "function_as_an_object": "no class of this package",
        "borrowed_class": "no class of this package",
        "npy_of_objects": "pickled objects", "path_outside": "is not a .npy"}


@pytest.mark.parametrize("what", FORGED)
def test_entry_that_could_run_code_is_refused_and_not_run(what, tmp_path):
    call = cache_child.table.lazy(1000)
    forge(call, *FORGED[what](tmp_path / "touched"))
    with pytest.warns(CacheWarning, match=f"refused.*{SAYS.get(what, '')}"): assert right(call.get())
    assert not (tmp_path / "touched").exists()

# ---------------------------------------------------------------------------------------------- export and import


@pytest.fixture
def archive(tmp_path):
    "An archive of three entries."
    for n in (3, 4, 5): cache_child.table(n)
    export_cache(tmp_path / "a.tar")
    return tmp_path / "a.tar"


def test_exported_entries_hit_in_an_empty_folder(archive, tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path / "new"))
    assert len(import_cache(archive)) == 3
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "readonly")
    for n in (3, 4, 5):
        value, how = quiet(cache_child.table.lazy(n))
        assert right(value, n) and how.hit
    assert not list((tmp_path / "new" / ".tmp").iterdir())


def test_damaged_entry_is_not_exported(tmp_path):
    for n in (3, 4): cache_child.table(n)
    flip(cache_child.table.lazy(4).folder / "a0.npy")
    with pytest.warns(CacheWarning, match=r"table\(n=4\) is not exported"): rows = export_cache(tmp_path / "a.tar")
    assert [r["call"] for r in rows] == ["cache_child.table(n=3)"] and not list(tmp_path.glob("*.part"))


def rewritten(archive, edit):
    "The archive with edit(member, bytes) -> (member, bytes) applied."
    out = archive.with_name("b.tar")
    with tarfile.open(archive) as old, tarfile.open(out, "w") as new:
        for m in old.getmembers():
            m, raw = edit(m, old.extractfile(m).read())
            m.size = len(raw)
            new.addfile(m, io.BytesIO(raw))
    return out


def _tamper(m, raw):
    if m.name.endswith("a0.npy"): raw = raw[:-1] + bytes([raw[-1] ^ 1])
    return m, raw


def _escape(m, raw): m.name = m.name.replace("cache_child.table", ".."); return m, raw
def _absolute(m, raw): m.name = f"/tmp/{m.name}"; return m, raw


def _link(m, raw):
    if m.name.endswith("a0.npy"): m.type, m.linkname, raw = tarfile.SYMTYPE, "/etc/passwd", b""
    return m, raw


def _elsewhere(m, raw): m.name = m.name.replace("cache_child.table", "cache_child.other"); return m, raw


@pytest.mark.parametrize("edit, says", [
    (_tamper, "a0.npy is damaged"), (_escape, "not a file"), (_absolute, "not a file"), (_link, "not a file"),
    (_elsewhere, "says that it is")], ids=lambda x: x.__name__[1:] if callable(x) else "")
def test_import_refuses_a_tampered_archive(edit, says, archive, tmp_path, monkeypatch):
    bad = rewritten(archive, edit)
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path / "new"))
    with pytest.raises(CacheError, match=says): import_cache(bad)
    assert cache_entries() == [] and not list((tmp_path / "new" / ".tmp").iterdir())


def test_import_refuses_a_truncated_archive(archive):
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(CacheError): import_cache(archive)


def test_import_waits_for_the_writer_of_a_key(archive, folder):
    call, order = cache_child.table.lazy(3), []
    with cache._locked(call.key):
        t = threading.Thread(target=lambda: (import_cache(archive), order.append("imported")))
        t.start()
        time.sleep(.3)
        order.append("written")
    t.join(timeout=20)
    assert order == ["written", "imported"]

# ---------------------------------------------------------------------------------------------- modes


def test_readonly_names_the_missing_call_and_computes_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "readonly")
    with pytest.raises(CacheMiss, match=r"cache_child\.counted\(n=5"): cache_child.counted(5, str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_off_neither_reads_nor_writes(monkeypatch, folder):
    cache_child.table(3)
    before = sorted(folder.rglob("*"))
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "off")
    assert not cache_child.table.lazy(3).fetch()[1].hit and sorted(folder.rglob("*")) == before


def test_invalid_mode_is_an_error_that_names_the_modes(monkeypatch):
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "readwrite")
    with pytest.raises(ValueError, match="rw, readonly, off"): cache_child.table(3)

# ---------------------------------------------------------------------------------------------- gc


def test_gc_keeps_the_most_valuable_seconds_per_byte(monkeypatch):
    ticks = iter([0, 100, 0, 1, 0, 50])  # seconds: 100, 1, 50
    monkeypatch.setattr(cache, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    for n in (1000, 1001, 10): cache_child.table(n)
    size = {r["call"]: r["bytes"] for r in cache_entries()}
    removed = gc(size["cache_child.table(n=10)"] + size["cache_child.table(n=1000)"])
    assert [r["call"] for r in removed] == ["cache_child.table(n=1001)"]
    assert [r["call"] for r in gc(size["cache_child.table(n=10)"])] == ["cache_child.table(n=1000)"]


def test_gc_leaves_what_is_being_written(folder):
    call = cache_child.table.lazy(5)
    call.get()
    begun = folder / ".tmp" / f"{call.key[:32]}-abc"
    begun.mkdir(parents=True)
    coming = folder / ".tmp" / "import-abc"
    coming.mkdir()
    with cache._locked(call.key), cache._locked("import"):
        assert gc(0) == [] and begun.exists() and coming.exists() and call.folder.exists()
    assert len(gc(0)) == 1 and not begun.exists() and not coming.exists() and not call.folder.exists()


def test_gc_reclaims_unreadable_entries_stale_beginnings_and_locks_and_nothing_else(folder):
    call = cache_child.table.lazy(5)
    call.get()
    (call.folder / "meta.json").write_bytes(b"\xff")
    kept = folder / "pools" / "mine.v1" / "file.csv"
    kept.parent.mkdir(parents=True)
    kept.write_text("a download")
    (folder / ".tmp" / "0123-x").mkdir()
    assert len(gc(10**9)) == 1
    assert not call.folder.exists() and kept.exists()
    assert not list((folder / ".tmp").iterdir()) and not list((folder / ".locks").iterdir())
    assert right(quiet(call)[0], 5)


def test_swept_lock_does_not_let_two_writers_in(monkeypatch):
    "Whose lock file is removed between opening and locking holds nothing, and must take the new one."
    real, taken = cache.FileLock.acquire, []

    def acquire(self, *args, **kwargs):
        got = real(self, *args, **kwargs)
        taken.append(1)
        if len(taken) == 1: os.unlink(self.lock_file)
        return got
    monkeypatch.setattr(cache.FileLock, "acquire", acquire)
    with cache._locked("0" * 32) as path:
        assert path.exists() and len(taken) == 2
        with pytest.raises(cache.Timeout), cache._locked("0" * 32, timeout=0): pass


def test_locks_exclude_each_other_while_they_are_swept(folder):
    inside, most = [], []

    def work():
        for _ in range(40):
            with cache._locked("0" * 32):
                inside.append(1); most.append(len(inside)); time.sleep(.0005); inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    while any(t.is_alive() for t in threads): cache._sweep()
    assert max(most) == 1 and len(most) == 160

# ---------------------------------------------------------------------------------------------- formats


def test_entry_of_the_first_format_still_loads():
    "tests/data/cache_v1 was written by format 1; whoever changes the format must still read it."
    place = HERE / "data" / "cache_v1"
    assert verified(place)["format"] == 1
    x = codec.read_value(place)
    assert x["array"].tolist() == [[1.5, 2.5]] and x["frame"].columns.tolist() == ["b", "a"] and x["t"] == (1, None)
    assert x["tensor"].dtype.is_floating_point and x["selection"].index.tolist() == [2, 0] and x["inf"] == float("inf")


@pytest.mark.parametrize("frame", [
    pd.DataFrame([[1, 2]], columns=pd.Index(["a", "b"], name="metric"), index=pd.Index(["r"], name="row")),
    pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["k", None])),
], ids=["named", "two_levels"])
def test_names_of_column_indexes_are_not_lost(frame, tmp_path):
    codec.Writer(tmp_path).write(frame)
    pd.testing.assert_frame_equal(codec.read_value(tmp_path), frame)


def test_enumerations_and_subclasses_do_not_turn_into_plain_values(tmp_path):
    import enum

    class Colour(enum.StrEnum): RED = "red"
    class Level(enum.IntEnum): LOW = 1
    class Text(str): pass
    assert len({digest.digest(x) for x in (Colour.RED, "red", Level.LOW, 1, Text("red"))}) == 5
    for x in (Colour.RED, Level.LOW, Text("red")):
        with pytest.raises(codec.Unstorable): codec.Writer(tmp_path).write([x])
    codec.Writer(tmp_path).write([np.str_("a"), 1j])
    assert [type(x) for x in codec.read_value(tmp_path)] == [np.str_, complex]
