"""The atlas as a page: every paper a row that opens, filtered in the browser; nothing is fetched."""

import ast
import hashlib
import re
from html import escape

import api
from docutils.nodes import make_id

from selectbench.core.registry import INDEX, methods
from selectbench.report.atlas import ATLAS, NEEDS, STATUSES, atlas_alt, atlas_counts, atlas_frame

STATUS = {"works": "something here is registered with the paper as its source",
          "shown": "a survey, theory or benchmark that a notebook carries",
          "open": "nothing here names it yet", "listed": "outside what this package is about"}


def picture(path):
    "The picture of the field as a PNG; drawn again only when the atlas, the registry or the drawing changed."
    parts = [INDEX.read_bytes(), ATLAS.read_bytes(), (api.PACKAGE / "report/atlas.py").read_bytes()]
    mark = path.with_suffix(".digest")
    digest = hashlib.sha256(b"".join(parts)).hexdigest()
    if path.exists() and mark.exists() and mark.read_text() == digest: return
    import matplotlib
    matplotlib.use("Agg")
    from selectbench.report.atlas import atlas_figure
    path.parent.mkdir(parents=True, exist_ok=True)
    atlas_figure().savefig(path, dpi=130)
    mark.write_text(digest)


def prose(text):
    "A description as HTML: escaped, with code marks as code."
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def section(card, books):
    "Where a method's notebook page defines it: page, anchor and title of the last heading above the definition."
    place = card["notebook"].removeprefix("nbs/")
    page, found = place.replace(".ipynb", ".html"), None
    for cell in books.get(place, {"cells": []})["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            found = (re.findall(r"^##+ (.+)$", source, re.M) or [found])[-1]
        elif defines(source, card["name"]): break
    return page, make_id(found or ""), re.sub(r"[`*$]", "", found or "")


def defines(source, name):
    "Whether a cell registers the method `name`: by the function's own name, or by `name=`."
    if "method(" not in source: return False
    return bool(re.search(rf"^(?:def|class) {name}\b|\bname=[\"']{name}[\"']", source, re.M))


def call(card, modules):
    "A method's call, as its source says it; classes by their constructor."
    module = modules[card["module"]]
    entry = module.registered(card["name"])
    node = module.nodes.get(entry)
    if isinstance(node, ast.ClassDef):
        node = next((n for n in node.body if isinstance(n, api.DEF) and n.name == "__init__"), None)
        given = api.signature(node, drop_self=True) if node else "(...)"
    else: given = api.signature(node) if node else "(...)"
    return entry, f"methods[{card['name']!r}]{given}"


def way(card, modules, books):
    "One registered method below its paper: the call, links to its reference and to its notebook's section."
    entry, text = call(card, modules)
    place = "/".join(card["module"].split(".")[1:])
    page, anchor, title = section(card, books)
    links = [f'<a data-section href="api/{place}.html#{card["module"]}.{entry}">reference</a>',
             f'<a data-section href="{page}#{anchor}">notebook{": " if title else ""}{escape(title)}</a>']
    if card["notebook"].removeprefix("nbs/") not in books: links.pop()
    return f"<pre>{escape(text, quote=False)}</pre><p>{prose(card['summary'])} {' · '.join(links)}</p>"


def body(row, cards, modules, books):
    "What a row opens: the algorithm, the claim, what is registered, the authors' repository."
    repo, url = row.repository, next((cards[name]["url"] for name in row.methods if cards[name]["url"]), "")
    parts = [f"<p>{prose(row.algorithm)}</p>"]
    if row.claim: parts.append(f"<p><b>The paper's claim</b> {prose(row.claim)}</p>")
    if row.data: parts.append(f"<p><b>Data it needs</b> {prose(row.data)}</p>")
    parts += [way(cards[name], modules, books) for name in row.methods]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo or ""):
        parts.append(f'<p><b>Authors\' code</b> <a href="https://github.com/{repo}">{escape(repo)}</a></p>')
    if url.startswith("http"): parts.append(f'<p><b>Paper</b> <a href="{escape(url)}">{escape(url)}</a></p>')
    return "".join(parts)


def line(row, cards, modules, books):
    "One paper as a table row; what the filters look at is in its data attributes."
    also = " ".join([row.key, *row.methods, *row.also])
    data = {"family": row.family, "status": row.status, "needs": row.needs, "also": also}
    data = " ".join(f'data-{name}="{escape(value)}"' for name, value in data.items())
    return (f'<tr id="paper-{escape(row.key)}" {data}><td><details><summary>{escape(row.title, quote=False)}</summary>'
            f'{body(row, cards, modules, books)}</details></td><td>{row.family}</td><td>{row.needs}</td>'
            f'<td><span class="status {row.status}">{row.status}</span></td></tr>')


def choice(name, label, values, counts):
    "A filter: a select with how many rows each value has."
    options = "".join(f'<option value="{v}">{v} ({counts[v]})</option>' for v in values)
    return f'<label>{label} <select name="{name}"><option value="">all</option>{options}</select></label>'


def filters(frame):
    "The form above the table."
    count = lambda column: frame[column].value_counts().to_dict()
    families = sorted(frame["family"].unique(), key=lambda f: (f == "none", f))
    return ('<form class="atlas-filter" role="search"><label>Search <input type="search" name="words" '
            'placeholder="words of a title, a method, an algorithm"></label>'
            + choice("family", "Chosen", families, count("family")) + choice("needs", "Needs", NEEDS, count("needs"))
            + choice("status", "Status", STATUSES, count("status"))
            + f'<output aria-live="polite">{len(frame)} papers</output></form>')


PAGE = """# The atlas

> Every paper about choosing that this package knows of, and whether it works here

{counts} A row opens to say what the algorithm does and, where it works, how it is called. The same table in Python:
{{py:obj}}`atlas_frame() <selectbench.report.atlas.atlas_frame>`.

{filters}
<table class="atlas"><caption class="visually-hidden">Papers, those that work first</caption>
<thead><tr><th scope="col">Paper</th><th scope="col">Chosen</th><th scope="col">Needs</th><th scope="col">Status</th>
</tr></thead><tbody>
{rows}
</tbody></table>

## What the words mean

{keys}

*Chosen* is the family: what a method chooses. *Needs* is what running the paper's own experiment takes, from a
processor to a large GPU. *(from memory)* marks what was not checked against the paper; where a row works, its notebook
was.

## The field

![{alt}](figures/atlas.png)

Left, all papers by what they need: *here / papers*. Right, those that are here, by the signals that their methods read;
signals are known only of what is registered.
"""


def page(modules, books):
    "The atlas as MyST markdown with the table as HTML."
    frame = atlas_frame()
    order = frame["status"].map(STATUSES.index)
    frame = frame.assign(order=order).sort_values(["order", "family", "title"], kind="stable")
    cards = {card["name"]: card for card in methods.published()}
    rows = "\n".join(line(row, cards, modules, books) for row in frame.itertuples())
    keys = "\n".join(f"* **{status}**: {what}" for status, what in STATUS.items())
    return PAGE.format(counts=atlas_counts(), filters=filters(frame), rows=rows, keys=keys, alt=atlas_alt())
