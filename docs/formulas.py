"""Formulas as MathML, set by KaTeX when the site is built, so that nothing moves when a page opens.

KaTeX is the copy that sphinxcontrib-katex carries, run by QuickJS. A formula that it cannot set stops the build."""

import base64
import functools
import importlib.util
import io
import re
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import quickjs
from docutils import nodes
from fontTools import subset

SET = """(tex, block) => module.exports.renderToString(
  tex, {displayMode: block, output: 'mathml', throwOnError: true, strict: 'error'})"""
VARIANT = re.compile(r'<m(\w) mathvariant="(double-struck|script|bold)">([^<]*)</m\1>')
STYLE = re.compile("(?:MATHEMATICAL )?(ITALIC|BOLD|SCRIPT|DOUBLE-STRUCK) (?!ITALIC|SCRIPT|FRAKTUR)")
SIGNS = ("ℏℓ℘ȷı±×÷·′″…⋯⋮⋱‖∣∥∂∇∏∑∫√∞∈∉∋∅∀∃¬∧∨∩∪⊂⊃⊆⊇∼≈≃≅≡≠∝∗∘⋆⋅⊕⊖⊗⊙⊤⊥−∖≤≥≪≫≺≻"
         "≔←→↔↑↓↦⇐⇒⇔⟨⟩⌊⌋⌈⌉⏞⏟ˆˇ˜¯ˉ˙¨´‾")
SCRIPTS = ("msub", "msup", "msubsup", "munder", "mover", "munderover")
APPLY, THIN, CLOSING = "\u2061", {"width": "0.1667em"}, tuple(")]}⟩⌉⌋∥∣!")  # APPLY follows the name of a function
BARE = {"lspace": "0.06em", "rspace": "0.06em"}
SPACES = "\u00a0\u2003\u2004\u2005\u2006\u2009\u200a\u200b\u2061\u2062\u2063\u2064\n"  # with what is not drawn


@functools.cache
def styles():
    "{(letter, style): the character for it}; MathML Core leaves it to the page to choose it."
    found = {("h", "italic"): "ℎ"}
    for char in map(chr, (*range(0x2100, 0x2150), *range(0x1D400, 0x1D800))):
        name = STYLE.match(unicodedata.name(char, ""))
        if name and unicodedata.decomposition(char).startswith("<font>"):
            found[chr(int(unicodedata.decomposition(char)[7:], 16)), name[1].lower()] = char
    return found


@functools.cache
def setter():
    "KaTeX's function (TeX, whether on lines of its own) -> markup."
    source = Path(importlib.util.find_spec("sphinxcontrib.katex").origin).with_name("katex.min.js")
    context = quickjs.Context()
    context.eval("var exports = {}, module = {exports: exports};" + source.read_text(encoding="utf-8"))
    return context.eval(SET)


def named(element):
    "Whether an element is the name of a function, such as log or max, perhaps with something below or above it."
    return element.tag in SCRIPTS and any(e.text == APPLY for e in element[0]) if len(element) else False


def tight(before, element):
    "Whether there is no room between a function's name and what stands beside it: a bracket, an operator, a space."
    return element.tag in ("mo", "mspace", "mtext") and not (before and element.text in CLOSING)


def spaced(row):
    "Give the children of a row the room that TeX gives them, where browsers leave it to the page."
    for i, element in reversed(list(enumerate(row))):
        left, right = row[i - 1] if i else None, row[i + 1] if i + 1 < len(row) else None
        base = left[0] if left is not None and left.tag in SCRIPTS else left
        first = base is None or base.tag == "mo" and base.text not in CLOSING
        if element.tag == "mo" and element.text in ("−", "+", "±") and first: element.set("form", "prefix")
        if element.tag in SCRIPTS and "minsize" in element[0].attrib:  # a large bracket stretches only in a row
            row.insert(i, element[0])
            element[0] = ElementTree.Element("mspace", {"height": f"{float(row[i].get('minsize')[:-2]) / 2 + .25}em"})
        if not (element.text == APPLY or named(element)): continue
        start = i - 1 if element.text == APPLY else i
        if right is not None and not tight(False, right): row.insert(i + 1, ElementTree.Element("mspace", THIN))
        if start > 0 and not tight(True, row[start - 1]): row.insert(start, ElementTree.Element("mspace", THIN))


def mend(element):
    "What of KaTeX's MathML browsers do not draw as TeX would."
    if element.tag in SCRIPTS and len(element) > 2 + (element.tag in ("msubsup", "munderover")):  # KaTeX's slip
        element[:] = [child for child in element if child.text != APPLY]
    if element.tag in ("math", "mrow", "mstyle", "msqrt", "menclose"): spaced(element)
    if element.tag == "mo" and element.text in ("∥", "∣") and element.attrib: element.attrib |= BARE
    if element.text == "∥" and "minsize" in element.attrib: element.text = "‖"  # else drawn over what it encloses
    if element.text == "∖": element.text, element.attrib = "\\", {"lspace": "0.2em", "rspace": "0.2em"}  # is tiny
    if element.tag == "mover" and element[1].text == "ˉ":  # else the bar touches the letter
        element.attrib, element[1].text = {}, "‾"
    if element.tag == "munder" and element[1].text == "⏟":  # browsers draw half of a wide one
        element.tag, element.attrib = "mrow", {"class": "braced"}
        element.remove(element[1])


@functools.cache
def mathml(tex, block=False):
    "The `<math>` of a formula; ValueError for TeX that KaTeX does not take, or that the font has no sign for."
    try: text = setter()(tex, block)
    except quickjs.JSException as e: raise ValueError(f"formula {tex!r}: {e}") from None
    text = re.search(r"<math.*</math>", text, re.S)[0].replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
    text = VARIANT.sub(lambda m: f"<m{m[1]}>{''.join(styles()[c, m[2]] for c in m[3])}</m{m[1]}>", text)
    math = ElementTree.fromstring(text.replace("<mo>:</mo><mo>=</mo>", "<mo>≔</mo>"))
    shown = "".join("".join(e.itertext()) for e in math[0] if e.tag != "annotation")
    lost = set(shown) - characters() - set(SPACES)
    if lost: raise ValueError(f"formula {tex!r}: {sorted(lost)} are not in docs/formulas.py")
    for element in list(math.iter()): mend(element)
    return ElementTree.tostring(math, encoding="unicode")


@functools.cache
def characters():
    "What formulas may hold, with the letters that a browser makes italic."
    plain = (letter for letter, style in styles() if style == "italic")
    return frozenset([*map(chr, range(0x20, 0x7F)), *SIGNS, *plain, *styles().values()])


def stylesheet():
    """Write CSS that holds the part of STIX Two Math which `characters` needs, and return its path.

    The font is in the CSS, so that it is there when the text is first laid out."""
    path = Path(__file__).resolve().parents[1] / "build" / "formulas.css"
    options = subset.Options(flavor="woff", layout_features=[], hinting=False, drop_tables=["DSIG", "GPOS"])
    source = Path(importlib.util.find_spec("ziamath").origin).with_name("fonts") / "STIXTwoMath-Regular.ttf"
    font, subsetter, out = subset.load_font(str(source), options), subset.Subsetter(options), io.BytesIO()
    subsetter.populate(text="".join(characters()))
    subsetter.subset(font)
    subset.save_font(font, out, options)
    url = f"data:font/woff;base64,{base64.b64encode(out.getvalue()).decode()}"
    path.parent.mkdir(exist_ok=True)
    face = f'font-family: "formulas"; src: url({url}) format("woff"); font-display: block;'
    path.write_text(f"@font-face {{ {face} }}\n", encoding="utf-8")
    return path


def parts(tex):
    r"A displayed formula cut at each \qquad outside of braces and environments: where a narrow page may break it."
    found, depth = [""], 0
    for token in re.split(r"(\\qquad\b|\\left\b|\\right\b|\\begin\b|\\end\b|\\.|[{}])", tex, flags=re.S):
        depth += (token in ("{", r"\left", r"\begin")) - (token in ("}", r"\right", r"\end"))
        if token == r"\qquad" and depth == 0: found.append("")
        else: found[-1] += token
    return [part for part in found if part.strip()]


def inline(self, node):
    "Write a formula in the text."
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def display(self, node):
    "Write a formula on lines of its own."
    found = "\n".join(mathml(part, True) for part in parts(node.astext()))
    self.body.append(self.starttag(node, "div", CLASS="formula") + found + "</div>")
    raise nodes.SkipNode
