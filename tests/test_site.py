"""The site as a reader meets it: formulas, and in a real browser that nothing moves and nothing is cut off."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
import formulas

SEEN = """() => new Promise(done => {
  let moved = 0;
  new PerformanceObserver(list => { for (const e of list.getEntries()) moved += e.value })
    .observe({type: "layout-shift", buffered: true});
  const cut = kind => [...document.querySelectorAll(kind)].filter(e => e.scrollWidth > e.clientWidth + 1).length;
  setTimeout(() => done({moved, formulas: cut("div.formula"), page: document.documentElement.scrollWidth}), 200) })"""


@pytest.mark.parametrize("tex, shown", [
    (r"x", "<mi>x</mi>"), (r"\mathbb R", "<mi>ℝ</mi>"), (r"\mathcal{L}", "<mi>ℒ</mi>"), (r"\mathbf 1", "<mn>𝟏</mn>"),
    (r"x := y", "<mi>x</mi><mo>≔</mo><mi>y</mi>"), (r"a \le b", "<mi>a</mi><mo>≤</mo><mi>b</mi>")])
def test_formulas_are_mathml(tex, shown):
    "Letters of an alphabet of their own are characters: browsers no longer know `mathvariant`."
    assert shown in formulas.mathml(tex) and tex in formulas.mathml(tex)


@pytest.mark.parametrize("tex, shown", [
    (r"t\ln 2", '<mi>t</mi><mspace width="0.1667em" /><mi>ln</mi><mo>\u2061</mo><mspace width="0.1667em" /><mn>2</mn>'),
    (r"\log(x)", '<mi>log</mi><mo>\u2061</mo><mo stretchy="false">('),
    (r"\sigma(-z)", '<mo form="prefix">−</mo><mi>z</mi>'), ("a - b", "<mi>a</mi><mo>−</mo><mi>b</mi>"),
    ("(a) - b", ")</mo><mo>−</mo>"), (r"\lVert x\rVert", 'lspace="0.06em" rspace="0.06em">∥</mo><mi>x</mi>'),
    (r"p(k \mid x)", "<mi>k</mi><mo>∣</mo><mi>x</mi>"),
    (r"\bigl(x\bigr)^2", 'maxsize="1.2em">)</mo><msup><mspace height="0.85em" /><mn>2</mn>'),
    (r"p_{\min}^2", "<msubsup><mi>p</mi><mi>min</mi><mn>2</mn></msubsup>"),
    (r"\bar x", "<mover><mi>x</mi><mo>‾</mo></mover>"), (r"\sum_t -p", '<mo form="prefix">−</mo><mi>p</mi>'),
    (r"\lVert x\rVert - 1", "∥</mo><mo>−</mo><mn>1</mn>"),
    (r"\underbrace{a}_b", '<munder><mrow class="braced"><mi>a</mi></mrow><mi>b</mi></munder>')])
def test_formulas_have_the_room_that_tex_gives(tex, shown):
    "Around the name of a function, none after a minus that is a sign or inside bars."
    assert shown in formulas.mathml(tex)


@pytest.mark.parametrize("tex, why", [(r"\nosuch x", "nosuch"), (r"\frac{1", "frac"), ("x ж", "ж")])
def test_a_formula_that_cannot_be_set_is_an_error(tex, why):
    with pytest.raises(ValueError, match=why): formulas.mathml(tex)


def test_a_displayed_formula_may_break():
    r"At a \qquad, not inside braces, brackets that stretch or an environment; nothing else is lost."
    whole = r"a = \left(b \qquad c\right), \qquad \text{d \qquad e} \qquad \{f\}"
    assert [part.strip() for part in formulas.parts(whole)] == [
        r"a = \left(b \qquad c\right),", r"\text{d \qquad e}", r"\{f\}"]


def test_punctuation_stays_with_its_formula():
    import finish
    text = "by (<math>a</math>), <math>b</math>; <math>c</math> d"
    assert finish.kept_together(text) == ('by <span class="together">(<math>a</math>),</span> '
                                          '<span class="together"><math>b</math>;</span> <math>c</math> d')


def test_a_plain_word_is_no_link():
    "Unless it stands on the page of its module, has brackets, or names a method of the same room or in a report."
    import build
    names = build.Names({}, {"margin": "selectbench.c.margin"})
    names.full = {"draw": "selectbench.a.b.draw", "margin": "selectbench.c.margin", "k_best": "selectbench.c.k_best"}
    link = lambda text, here="": names.link(text, here).count("py:obj")
    assert (link("`draw`"), link("`draw()`"), link("`draw`", "selectbench.a.b")) == (0, 1, 1)
    assert link("`margin` `k_best`") == 1 and link("`margin` `k_best`", "selectbench.c.d") == 2
    names.full |= {"selectbench.a.b.k_best": "selectbench.a.b.k_best"}
    assert "<selectbench.a.b.k_best>" in names.link("`k_best`", "selectbench.a.b")


def test_letters_have_their_styles():
    styles = formulas.styles()
    assert [styles[pair] for pair in (("h", "italic"), ("R", "double-struck"), ("e", "script"), ("α", "italic"))] == [
        "ℎ", "ℝ", "ℯ", "𝛼"]
    assert not {c for c in styles.values() if len(c) != 1}


@pytest.mark.timeout(900)
def test_nothing_moves_and_nothing_is_cut_off(browser, pages):
    "Every page, from disk, at 1,280 px: nothing shifts, no formula is wider than its text, no page than the window."
    faults, page = {}, browser.new_page(viewport={"width": 1280, "height": 900})
    for path in sorted(pages.rglob("*.html")):
        if "_static" in path.relative_to(pages).parts: continue
        page.goto(path.as_uri())
        seen = page.evaluate(SEEN)
        if seen["moved"] > .01 or seen["formulas"] or seen["page"] > 1280: faults[path.name] = seen
    page.close()
    assert faults == {}


def test_the_atlas_leads_to_the_notebook(browser, pages):
    "A search, a row opened by keyboard, its link followed: the notebook's section is on the screen."
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((pages / "atlas.html").as_uri())
    page.get_by_role("searchbox").or_(page.locator("form.atlas-filter input")).first.fill("mamba-shedder")
    row = page.locator("table.atlas tbody tr:not([hidden])")
    assert row.count() == 1
    row.locator("summary").press("Enter")
    row.get_by_role("link", name="notebook").click()
    page.wait_for_url("**/ssm/compress.html#*")
    assert page.locator(f"[id='{page.url.split('#')[1]}']").locator("h2, h3").first.is_visible()
    page.close()
