"""A selection goes where the data goes, and labels that were bought survive a failing oracle."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from selectbench import Oracle, OracleError, Selection, method
from selectbench.core.pool import Pool

CHOSEN = Selection([3, 0], n=4)


class LikeHuggingFace:
    "The part of a `datasets.Dataset` that counts here: a length, a two-number shape and `select`."
    shape = (4, 2)
    def __len__(self): return 4
    def select(self, index): return ["selected", *map(int, index)]


@pytest.mark.parametrize("data, want", [
    ([10, 11, 12, 13], [13, 10]), ((10, 11, 12, 13), (13, 10)), (["a", "b", "c", "d"], ["d", "a"]),
    (LikeHuggingFace(), ["selected", 3, 0])])
def test_take_from_sequences(data, want): assert CHOSEN.take(data) == want


def test_take_from_arrays_tensors_tables_and_pools():
    x = np.arange(8).reshape(4, 2)
    assert CHOSEN.take(x).tolist() == [[6, 7], [0, 1]]
    assert CHOSEN.take(torch.from_numpy(x)).tolist() == [[6, 7], [0, 1]]
    assert CHOSEN.take(scipy.sparse.csr_array(x)).toarray().tolist() == [[6, 7], [0, 1]]
    frame = pd.DataFrame(x, index=list("abcd"), columns=["u", "v"])
    assert CHOSEN.take(frame).index.tolist() == ["d", "a"] and CHOSEN.take(frame["u"]).tolist() == [6, 0]
    assert CHOSEN.take(Pool("p", "1", {"y": np.arange(4)}, n=4))["y"].tolist() == [3, 0]


def test_take_refuses_data_of_another_length():
    with pytest.raises(ValueError, match="`x`"): CHOSEN.take([1, 2, 3])


def test_sampler_reshuffles_each_epoch_reproducibly():
    epochs = lambda: (lambda s: [list(s), list(s)])(Selection(np.arange(20), n=20).sampler(shuffle=True, seed=1))
    assert epochs() == epochs() and epochs()[0] != epochs()[1] and sorted(epochs()[0]) == list(range(20))


def test_file_with_a_pickle_is_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", meta=np.array([object()], dtype=object))
    with pytest.raises(ValueError): Selection.load(tmp_path / "bad.npz")
    with pytest.raises(TypeError, match="pickle"): Selection([0], n=1, info={"x": object()}).save(tmp_path / "s.npz")


def test_bought_labels_survive_a_failing_oracle_and_are_counted():
    @method("data", paper="planted", name="asks_in_test_selection")
    def asks(embeddings, oracle, k, *, seed=0):
        index = np.random.default_rng(seed).permutation(len(embeddings))[:k]
        return Selection(index, n=len(embeddings), info={"labels": [oracle(i) for i in index]})

    x, y = np.zeros((9, 2), np.float32), np.arange(9) % 3
    done = asks(x, lambda i: y[i], 4)
    assert done.cost["labels"] == 4 and done.info["labels"] == y[done.index].tolist()
    left = iter(range(2))
    with pytest.raises(OracleError) as failed: asks(x, lambda i: [y[i], next(left)][0], 4)
    assert failed.value.selection.index.tolist() == done.index[:2].tolist()
    oracle = Oracle(y, 9); asks(x, oracle, 3)
    assert oracle.spent == 3


def test_a_budget_in_tokens():
    chosen = Selection([3, 0, 2, 1], n=4, score=[3, 1, 2, 4], weight=[.1, .2, .3, .4])
    sizes = np.array([5, 1, 2, 9])
    kept = chosen.within(sizes, 8)  # 3 alone is too large; 0 and 2 fit, and 1 as well
    assert kept.index.tolist() == [0, 2, 1] and kept.weight.tolist() == [.2, .3, .4] and kept.n == 4
    assert chosen.within(sizes, 7).index.tolist() == [0, 2] and chosen.within(sizes, 17).k == 4
    with pytest.raises(ValueError, match="`n_tokens`"): chosen.within(sizes, 0.5)
    for bad in (sizes[:3], -sizes, sizes * np.nan):
        with pytest.raises(ValueError, match="`sizes`"): chosen.within(bad, 8)
