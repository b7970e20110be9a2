"""From a notebook as it is worked on to a notebook as it is read: nbdev's directives become tags or go away."""

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
LONG = 30  # an exported cell with more lines than this is folded on the page
LIVE = ("application/vnd.jupyter", "application/javascript", "application/vnd.holoviews")


def split(source):
    "The directives at the top of a cell as (name, value) pairs, and the code below them."
    lines, found = source.splitlines(), []
    for i, line in enumerate(lines):
        match = DIRECTIVE.match(line)
        if match: found.append((match[1], match[2].lower()))
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


def code_cell(cell):
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
    nb, cells = deepcopy(nb), []
    for cell in nb["cells"]:
        kind = cell["cell_type"]
        if kind == "markdown": cell["source"] = (link or str)("".join(cell["source"]))
        made = {"code": code_cell, "raw": title_of}.get(kind, lambda c: c)(cell)
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
