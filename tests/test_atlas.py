"""The atlas: complete, in step with the registry, searchable."""

import subprocess
import sys

import pytest

from selectbench.core.registry import methods
from selectbench.report.atlas import STATUSES, atlas_alt, atlas_counts, atlas_field, atlas_frame, atlas_rows

ATLAS = atlas_frame()


def test_every_paper_is_there_once():
    assert len(ATLAS) == len(atlas_rows()) == 559 and ATLAS["key"].is_unique
    assert ATLAS["title"].str.len().min() > 0 and set(ATLAS["status"]) <= set(STATUSES)


def test_every_key_that_a_method_names_is_in_the_atlas():
    lost = {c["name"]: c["key"] for c in methods.cards() if c["key"] and c["key"] not in set(ATLAS["key"])}
    assert not lost, lost


def test_status_follows_the_registry():
    keyed = {c["key"] for c in methods.published() if c["key"]}
    for row in ATLAS.itertuples():
        told = row.kind in ("survey", "theory", "benchmark")
        expected = ("shown" if told else "works") if row.key in keyed else "listed" if row.family == "none" else "open"
        assert row.status == expected, row.key
        assert bool(row.methods) == (row.key in keyed) == row.notebook.endswith(".ipynb")


def test_search_takes_all_words_in_any_case_and_no_patterns():
    found = atlas_frame("IMPORTANCE resampling")
    assert "dsir" in set(found["key"]) and len(found) < 20
    assert set(atlas_frame("resampling importance")["key"]) == set(found["key"])
    assert len(atlas_frame(".*")) < 5 and len(atlas_frame("no such words at all")) == 0
    assert list(atlas_frame("no such words")) == list(ATLAS)
    assert set(atlas_frame(family="moe", status="works")["family"]) == {"moe"}


@pytest.mark.parametrize("wrong, near", [({"family": "dat"}, "'data'"), ({"status": "work"}, "'works'"),
                                         ({"needs": "small-trains"}, "'small-train'")])
def test_unknown_filters_are_named_with_near_names(wrong, near):
    (name, _), = wrong.items()
    with pytest.raises(ValueError, match=f"`{name}`.*{near}"): atlas_frame(**wrong)


def test_the_table_loads_neither_torch_nor_matplotlib():
    code = ("import sys; from selectbench.report.atlas import atlas_frame; atlas_frame('data'); "
            "sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_picture_counts_every_paper_once():
    field, placed = atlas_field(), ATLAS[ATLAS["family"] != "none"]
    here = placed[placed["methods"].str.len() > 0]
    assert field["papers"].sum(axis=1).to_dict() == placed["family"].value_counts().to_dict()
    assert field["here"].to_numpy().sum() == len(here) and (field["here"] <= field["papers"]).all(axis=None)
    reads = {c["name"] for c in methods.published() if "embeddings" in c["signals"]}
    assert field["signals"]["embeddings"].sum() == sum(bool(reads & set(names)) for names in here["methods"])
    assert f"model {field['here'].loc['model'].sum()} of {(placed['family'] == 'model').sum()}" in atlas_alt()


def test_the_sentence_counts_what_is_registered():
    said, counts = atlas_counts(), ATLAS["status"].value_counts()
    assert f"**{len(ATLAS)} papers**" in said and f"**{counts['works']} work here**" in said
    assert f"{len(methods.published())} names" in said
