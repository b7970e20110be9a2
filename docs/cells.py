"""From a notebook as it is worked on to a notebook as it is read: nbdev's directives become tags or go away."""

import ast
import re
from copy import deepcopy

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
DROP = {("hide", ""), ("include", "false")}
TAGS = {
    ("echo", "false"): "remove-input", ("hide_input", ""): "remove-input",
    ("output", "false"): "remove-output", ("hide_output", ""): "remove-output",
    ("code-fold", "true"): "hide-input", ("code-fold", "show"): "hide-input",
}
EXPORTS = {"export", "exports", "exporti", "export_and_show"}
ALT = 240  # characters of a figure's text where none is given
LONG = 30  # an exported cell with more lines than this is folded on the page
LIVE = ("application/vnd.jupyter", "application/javascript", "application/vnd.holoviews")


def split(source):
    "The directives at the top of a cell as (name, value) pairs, and the code below them."
    lines, found = source.splitlines(), []
    for i, line in enumerate(lines):
        match = DIRECTIVE.match(line)
        if match: found.append((match[1], match[2] if match[1] == "fig-alt" else match[2].lower()))
        elif line.strip(): return found, "\n".join(lines[i:])
    return found, ""


def static(outputs):
    "The outputs a page can show: no live widgets, no progress bars."
    kept = []
    for out in outputs:
        if out.get("output_type") == "stream" and out.get("name") == "stderr": continue
        if "data" in out:
            out["data"] = {mime: data for mime, data in out["data"].items() if not mime.startswith(LIVE)}
            if not out["data"]: continue
        kept.append(out)
    return kept


def only_imports(source):
    "Whether a cell imports and does next to nothing else: a setting or two after four imports."
    try: body = ast.parse(source).body
    except SyntaxError: return False  # a line for IPython
    rest = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
    small = all(isinstance(node, ast.Assign | ast.Expr) and node.end_lineno - node.lineno < 2 for node in rest)
    return not rest or (small and len(rest) <= 2 and len(body) - len(rest) >= 4)


def plain(markdown):
    "Markdown as plain words: no code blocks, tables, headings, links or marks."
    text = re.sub(r"(?m)^(\|.*|#+ .*|> )$", "", re.sub(r"(?ms)^```.*?^```|\$\$.*?\$\$", "", markdown))
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\s+", " ", re.sub(r"[*`$]|(?<!\w)_|_(?!\w)|<[^>]+>", "", text)).strip()


def words_for(heading, before):
    "The text of an image: the section it stands in and the last paragraph before it, cut at a sentence."
    last = plain([part for part in re.split(r"\n\s*\n", before.strip()) if plain(part)][-1]) if plain(before) else ""
    sentences, text = re.split(r"(?<=[.:?!]) ", last), ""
    for sentence in sentences:
        if len(text) + len(sentence) > ALT: break
        text = f"{text} {sentence}".strip()
    return f"Figure, {heading}: {text or last[:ALT]}".rstrip(": ") if heading else f"Figure: {text or last[:ALT]}"


def axes(source):
    "What a cell writes on the axes it draws, as words; empty where it writes nothing plain."
    found = re.findall(r"""\b(?:set_)?[xy]label(?:=|\()\s*["']([^"'{}]+)["']""", source)
    return f" Axes: {', '.join(dict.fromkeys(plain(x) for x in found))}." if found else ""


def with_alt(cell, heading, before, directives=()):
    "Put the words for its pictures beside a code cell that draws: `#| fig-alt: words`, or what stands before it."
    if not any(mime.startswith("image/") for out in cell["outputs"] for mime in out.get("data", {})): return
    said = dict(directives).get("fig-alt") or words_for(heading, before) + axes(cell["source"])
    cell["metadata"]["mystnb"] = {"image": {"alt": said}}


def code_cell(cell, heading="", before=""):
    "A code cell as it is read, or None where nothing of it is for readers."
    directives, source = split("".join(cell["source"]))
    if DROP & set(directives) or not source.strip(): return None
    tags = [TAGS[d] for d in directives if d in TAGS]
    if EXPORTS & {name for name, _ in directives}:
        tags.append("exported")
        if source.count("\n") >= LONG: tags.append("hide-input")
    old = cell.get("metadata", {}).get("tags", [])
    cell.update(source=source, outputs=static(cell.get("outputs", [])))
    cell["metadata"] = {"tags": sorted({*old, *tags})}
    if only_imports(source):
        cell["metadata"] = {"tags": sorted({*old, *tags, "hide-input"}),
                            "mystnb": {"code_prompt_show": "Show the imports", "code_prompt_hide": "Hide the imports"}}
    with_alt(cell, heading, before, directives)
    return cell


def title_of(cell):
    "The page's title from nbdev's raw front matter cell, as markdown; None for any other raw cell."
    fields = dict(re.findall(r"^(title|description):\s*(.+?)\s*$", "".join(cell["source"]), re.M))
    if "title" not in fields: return None
    fields = {name: value.strip("\"'") for name, value in fields.items()}
    source = f"# {fields['title']}" + (f"\n> {fields['description']}" if "description" in fields else "")
    return {"cell_type": "markdown", "id": cell.get("id", "title"), "metadata": {}, "source": source}


def readable(nb, link=None):
    "A copy of the notebook (a dict) for readers; `link` rewrites the text of each markdown cell."
    nb, cells, section, before = deepcopy(nb), [], "", ""
    for cell in nb["cells"]:
        kind, made = cell["cell_type"], cell
        if kind == "markdown":
            before = "".join(cell["source"])
            heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", before, flags=re.M | re.S), re.M)
            section = plain(heads[-1].lstrip("> ")) if heads else section
            cell["source"] = (link or str)(before)
        if kind == "code": made = code_cell(cell, section, before)
        if kind == "raw": made = title_of(cell)
        if made: cells.append(made)
    nb["cells"] = cells
    nb["metadata"] = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"},
                      "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return nb


def heading(nb):
    "Title and one-line summary of a notebook: `# Title` and `> summary` in its first cells."
    text = "\n".join("".join(c["source"]) for c in nb["cells"][:3] if c["cell_type"] == "markdown")
    title = re.search(r"^# (.+)$", text, re.M)
    summary = re.search(r"^> (.+(?:\n> .+)*)$", text, re.M)
    return title and title[1].strip(), summary and summary[1].replace("\n> ", " ").strip()
