"""Builds the site from the notebooks, README from the first of them, and checks every link of the result.

    python docs/build.py site      nbs/ -> build/site (what Sphinx reads) -> _docs/
    python docs/build.py readme    nbs/index.ipynb -> README.md
    python docs/build.py links     every page of _docs/ is sound: links resolve and are relative, images have words and
                                   a size, headings are in order, nothing is loaded from elsewhere
    python docs/build.py tour      run the tour's studies, write figures/tour.csv, which the home page shows
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import api
import atlas_page
import finish
from cells import heading, readable

ROOT = Path(__file__).resolve().parents[1]
BUILD, NBS, PAGES = ROOT / "build", ROOT / "nbs", ROOT / "_docs"
SOURCE = BUILD / "site"
ROOMS = {
    "core": "What everything else stands on: selections, the registry of methods, the cache, tasks, studies.",
    "nn": "What models are built and watched with: selective scan, blocks, routers, trace hooks.",
    "pools": "Real data, by name: bundled, downloaded and verified, or from a local folder.",
    "zoo": "Small real models trained here, and loaders for models of a hub.",
    "signals": "How each signal is measured.",
    "data": "Choosing training examples.",
    "token": "Choosing tokens.",
    "model": "Choosing models.",
    "merge": "Choosing what to merge.",
    "param": "Choosing parameters.",
    "moe": "Choosing experts.",
    "ssm": "Choosing what a state space model keeps.",
    "context": "Choosing context.",
    "feature": "Choosing features.",
    "evals": "Choosing what to evaluate on.",
    "output": "Choosing among answers.",
    "order": "Choosing an order.",
    "report": "Plots, the tour and the command line.",
}
GENERAL = ("reports", "report", "index", "start", "core")  # rooms whose pages speak of methods of every family
CALL = re.compile(r"(?<![`\[\w{}])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])")


def public(module):
    "Public names of a module, `Class.member` too."
    for name, node in module.objects():
        yield name
        if isinstance(node, ast.ClassDef):
            for member, _, _ in module.members(name, node): yield f"{name}.{member}"


class Names:
    """Public names of the package: how a name in backticks finds its entry in the reference.

    A plain word, such as `draw`, is one only on the page of its module, with brackets, or for a method of that room.
    `methods`: name -> place of its entry, which a name with an underscore means before all others."""

    def __init__(self, modules, methods):
        self.modules, self.methods, self.full, seen = modules, methods, {}, {}
        for module in modules.values():
            for name in public(module): seen.setdefault(name, []).append(f"{module.name}.{name}")
        for name, places in seen.items():
            if len(places) == 1: self.full[name] = places[0]
            self.full |= {place: place for place in places}
        self.full |= {place.removeprefix("selectbench."): place for place in self.full.values()}
        self.full |= {name: place for name, place in methods.items() if "_" in name and place in self.full}

    def link(self, text, here=""):
        "Markdown, of module `here`'s page, in which names in backticks, outside fences and headings, are links."
        parts = re.split(r"(^```.*?^```|^#+ .*?$|\$\$.*?\$\$)", text, flags=re.M | re.S)
        return "".join(part if i % 2 else CALL.sub(partial(self.role, here), part) for i, part in enumerate(parts))

    def role(self, here, match):
        "A reference role for a public name, or the text as it was."
        if match[1] in self.modules: return f"{{py:mod}}`{match[1]}`"
        place = self.full.get(f"{here}.{match[1]}") or self.full.get(match[1])
        word = match[1].isalpha() and match[1].islower() and not match[2]
        room = here.split(".")[1:2] or [""]
        meant = match[1] in self.methods and (room[0] in GENERAL or room == str(place).split(".")[1:2])
        if word and not meant and place != f"{here}.{match[1]}": return match[0]
        return f"{{py:obj}}`{match[1]}{match[2] or ''} <{place}>`" if place else match[0]


def write(path, text):
    "Write only what changed, so that a second build reads only that."
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text: path.write_text(text, encoding="utf-8")
    return path


def notebooks():
    "Path below nbs/ -> notebook, for every notebook that is a page."
    found = {}
    for path in sorted(NBS.rglob("*.ipynb")):
        place = path.relative_to(NBS)
        if any(part.startswith((".", "_")) for part in place.parts): continue
        found[place.as_posix()] = json.loads(path.read_text(encoding="utf-8"))
    return found


def catalogue():
    "The table of methods as a list of dicts; empty while the package has none."
    import selectbench
    return selectbench.methods().to_dict("records")


def known_signals():
    "Parameter of a method -> (type, what it is), for parameter tables."
    from selectbench.core.vocabulary import SIGNALS
    shape = lambda s: f"{s.dtype}[{', '.join(s.shape)}]" if s.shape else s.dtype
    return {s.name: (shape(s), f"*signal:* {s.what}") for s in SIGNALS.values()} | {
        "k": ("int", "*budget:* how many to choose"), "seed": ("int", "random seed")}


# The pages


def write_site():
    "Everything Sphinx reads, in build/site; what is no longer made is removed."
    modules = {name: api.Module(name, path) for name, path in api.modules().items()}
    books, rows = notebooks(), catalogue()
    names = Names(modules, {row["name"]: f"{module_of(row)}.{entry_of(row, modules)}" for row in rows})
    made = {write(SOURCE / place, json.dumps(page_of(place, nb, names, rows), sort_keys=True, indent=1))
            for place, nb in books.items()}
    made |= {write(SOURCE / f"{room}.md", room_page(room, what, books)) for room, what in ROOMS.items()
             if any(place.startswith(f"{room}/") for place in books)}
    used = usage(rows, books, modules)
    made |= write_reference(modules, names, rows, books, used)
    made |= {write(SOURCE / "methods.md", methods_page(rows, names, books, used)),
             write(SOURCE / "reports.md", reports_page(books)), write(SOURCE / "rooms.md", rooms_page(books)),
             write(SOURCE / "atlas.md", atlas_page.page(modules, books)),
             write(SOURCE / "contributing.md", contributing_page())}
    if "index.ipynb" not in books: made.add(write(SOURCE / "index.md", f"# selectbench\n\n{contents(books)}"))
    else: made.add(write(SOURCE / "index.ipynb", with_contents(SOURCE / "index.ipynb", books)))
    for path in SOURCE.rglob("*"):
        if path.is_file() and path not in made and "figures" not in path.parts: path.unlink()
    atlas_page.picture(SOURCE / "figures" / "atlas.png")
    if (ROOT / "figures").exists(): shutil.copytree(ROOT / "figures", SOURCE / "figures", dirs_exist_ok=True)


def page_of(place, nb, names, rows):
    "A notebook as a page: computed counts made anew, a report with the methods that it runs."
    made = readable(counted(nb), fix_links(place, names))
    if place.startswith("reports/"): made["cells"] += ran_cells(nb, rows, names)
    return made


def counted(nb):
    "A copy of a notebook in which cells that say how many papers and methods there are say it of today."
    from selectbench.report.atlas import atlas_counts
    nb = deepcopy(nb)
    for cell in nb["cells"]:
        if not "".join(cell["source"]).rstrip().endswith("Markdown(atlas_counts())"): continue
        for out in cell["outputs"]: out["data"]["text/markdown"] = [atlas_counts()]
    return nb


def fix_links(place, names):
    "The rewriting of one notebook's markdown: names become links, figures are found below the site's root."
    up = "../" * place.count("/")

    def room(match):
        "A link to a folder becomes one to its page, or plain text while the folder is empty."
        return f"[{match[1]}]({match[2]}.md)" if any((NBS / match[2]).glob("*.ipynb")) else match[1]

    def fix(text):
        text = re.sub(r"(\]\(|src=[\"'])(?:\.\./)+figures/", rf"\g<1>{up}figures/", text)
        text = re.sub(r"\[([^\]]+)\]\((\w+)/\)", room, text)
        text = re.sub(r"\]\((?:\.\./)+CONTRIBUTING\.md", f"]({up}contributing.md", text)
        return names.link(text, "selectbench." + place.removesuffix(".ipynb").replace("/", "."))
    return fix


def contents(books):
    "The site's sections, as Sphinx wants them."
    start = ["start"] if "start.ipynb" in books else []
    pages = "\n".join([*start, "reports", "methods", "atlas", "rooms", "api", "contributing"])
    return f"```{{toctree}}\n:hidden:\n:maxdepth: 3\n\n{pages}\n```\n"


def with_contents(path, books):
    "The home page's notebook with the site's sections below it."
    nb = json.loads(path.read_text(encoding="utf-8"))
    nb["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": contents(books)})
    return json.dumps(nb, sort_keys=True, indent=1)


def tree(pages): return "```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"


def listing(places, books, base=""):
    "A table of pages with their summaries."
    rows = []
    for place in places:
        title, summary = heading(books[place])
        rows.append(f"| [{title or Path(place).stem}]({base}{place}) | {(summary or '').replace('|', chr(92) + '|')} |")
    return "\n".join(["| Page | What it is |", "| --- | --- |", *rows])


def inside(folder, books): return [place for place in books if place.startswith(f"{folder}/")]


def room_page(room, what, books):
    places = inside(room, books)
    return f"# {room}\n\n{what}\n\n{listing(places, books)}\n\n{tree(places)}"


def rooms_page(books):
    rooms = [room for room in ROOMS if inside(room, books)]
    rows = "\n".join(f"| [{room}]({room}.md) | {ROOMS[room]} | {len(inside(room, books))} |" for room in rooms)
    return ("# Notebooks\n\nOne notebook is one module. A page reads top to bottom: the idea, the code, a check "
            "against something independent, real data.\n\n| Room | What it holds | Notebooks |\n| --- | --- | --- |\n"
            f"{rows}\n\n{tree(rooms)}")


def reports_page(books):
    places = inside("reports", books)
    body = f"{listing(places, books)}\n\n{tree(places)}" if places else ""
    return f"# Reports\n\nEach report asks one question of real data and answers it first.\n\n{body}"


def contributing_page():
    path = ROOT / "CONTRIBUTING.md"
    text = path.read_text(encoding="utf-8") if path.exists() else "# Contributing\n"
    return re.sub(r"\]\(nbs/", "](", text)


# The reference


def write_reference(modules, names, rows, books, used):
    "A page per module and the list of them."
    facts = {}
    for row in rows:
        facts.setdefault(module_of(row), {})[entry_of(row, modules)] = fact(row, books, used.get(row["name"]))
    known, made, listed = known_signals(), set(), {}
    for name, module in modules.items():
        place = "/".join(name.split(".")[1:])
        text = api.page(module, partial(names.link, here=name), facts.get(name), known)
        made.add(write(SOURCE / "api" / f"{place}.md", text))
        listed.setdefault(name.split(".")[1] if name.count(".") > 1 else "", []).append((name, place, module.summary))
    rooms = [room for room in ["", *ROOMS] if room in listed]
    made |= {write(SOURCE / "api" / f"{room}.md", reference_room(room, listed[room])) for room in rooms if room}
    made.add(write(SOURCE / "api.md", reference_home(rooms, listed, names)))
    return made


def reference_room(room, entries):
    rows = "\n".join(f"| {{py:mod}}`{name}` | {summary} |" for name, _, summary in entries)
    pages = [place for _, place, _ in entries]
    return f"# {room}\n\n{ROOMS[room]}\n\n| Module | What it is |\n| --- | --- |\n{rows}\n\n{tree(pages)}"


def reference_home(rooms, listed, names):
    source = ast.parse((ROOT / "selectbench" / "__init__.py").read_text(encoding="utf-8"))
    home = next((ast.literal_eval(node.value) for node in source.body if "_HOME" in api.targets(node)), {})
    top = [f"| {{py:obj}}`{name} <selectbench.{place}.{name}>` | {{py:mod}}`selectbench.{place}` |"
           for name, place in home.items() if f"selectbench.{place}.{name}" in names.full]
    body = ["# API reference", "The names at the top of the package, `from selectbench import ...`:",
            "\n".join(["| Name | Defined in |", "| --- | --- |", *top]), "## Modules"]
    for room in rooms:
        body += [f"### {room}"] if room else []
        body.append("\n".join(["| Module | What it is |", "| --- | --- |",
                               *(f"| {{py:mod}}`{name}` | {summary} |" for name, _, summary in listed[room])]))
    pages = [place for _, place, _ in listed.get("", [])] + [room for room in rooms if room]
    return "\n\n".join(body) + "\n\n" + tree([f"api/{page}" for page in pages])


# The list of methods


def module_of(row):
    name = str(row["module"])
    return name if name.startswith("selectbench.") else f"selectbench.{name}"


def entry_of(row, modules):
    "The name of a method's entry in the reference, which is its function's."
    module = modules.get(module_of(row))
    return module.registered(row["name"]) if module else row["name"]


def paper(row):
    title, url = str(row.get("paper") or "").replace("|", "\\|"), row.get("url")
    return f"[{title}]({url})" if isinstance(url, str) and url.startswith("http") else title


def fact(row, books, reports):
    "What a method's entry says of it: family, form of its answer, paper, and the pages that show it."
    year = f" ({row['year']:.0f})" if row.get("year") == row.get("year") and row.get("year") else ""
    atlas = f', <a href="{up_from(row)}atlas.html#paper-{row["key"]}">in the atlas</a>' if has_key(row) else ""
    lines = [f"*{row['family']}* {row['kind']}, returns a {row['returns']}.", f"**Paper** {paper(row)}{year}{atlas}"]
    if own_notebook(row) in books: lines.append(f"**Notebook** {page_links([own_notebook(row)], books, '/')}")
    if reports: lines.append(f"**Reports** {page_links(reports, books, '/')}")
    return " \\\n".join(lines)


def has_key(row): return isinstance(row.get("key"), str) and bool(row["key"])


def up_from(row): return "../" * module_of(row).count(".")


def words(value):
    "Names in a cell of the table of methods, whether a list or a string."
    found = value if isinstance(value, list | tuple) else re.split(r"[,\s]+", str(value or ""))
    return ", ".join(f"`{v}`" for v in found if v)


def own_notebook(row):
    "The notebook that defines a method, as a path below nbs/."
    return module_of(row).removeprefix("selectbench.").replace(".", "/") + ".ipynb"


def page_links(places, books, base=""):
    return ", ".join(f"[{heading(books[place])[0] or place}]({base}{place})" for place in places)


def runs(nb):
    "Words that a notebook may run something by: (module, name) that it imports, and those it quotes or tabulates."
    code = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code")
    taken = {("", name) for name in re.findall(r"\bmethods\[[\"'](\w+)", code)}
    for place, names in re.findall(r"from (selectbench[\w.]*) import ([^\n(]+|\([^)]*\))", code):
        taken |= {(place, name) for name in re.findall(r"\w+", names)}
    shown = ["".join(out["data"].get("text/html", "")) for cell in nb["cells"] for out in cell.get("outputs", [])
             if "data" in out]
    bodies = re.sub(r"(?s)<thead.*?</thead>", "", "".join(shown))
    named = re.findall(r"<t[hd][^>]*>\s*(\w[\w -]*?)(?:\([^<]*\))?\s*</t[hd]>", bodies)
    named += re.findall(r"[\"'](\w[\w -]*)[\"']", code)
    return taken, {re.sub(r"[ -]", "_", name.lower()) for name in named} | {*named}


def ran(nb, rows, modules):
    """The methods that a notebook runs, in the order of the list of methods.

    One that is merely named, and alone of its family, is a word like `entropy` that happens to be a method's name."""
    taken, named = runs(nb)
    whole = lambda row: {("", row["name"]), *((module_of(row), n) for n in (row["name"], entry_of(row, modules)))}
    sure = {row["name"] for row in rows if whole(row) & taken}
    maybe = [row for row in rows if row["name"] in named or row["name"] in sure]
    held = [row["family"] for row in maybe if row["name"] not in ("random", "everything")]
    sure |= {row["name"] for row in maybe if held.count(row["family"]) > 1} | {"random", "everything"}
    return [row for row in by_family(maybe) if row["name"] in sure]


def usage(rows, books, modules):
    "Method -> the reports that run it."
    found = {}
    for place in inside("reports", books):
        for row in ran(books[place], rows, modules): found.setdefault(row["name"], []).append(place)
    return found


def ran_cells(nb, rows, names):
    "The last section of a report: the methods that it runs, with their papers."
    summary = lambda row: names.link(row["summary"].replace("|", "\\|"))
    lines = [f"| {reference(row, names)} | {row['family']} | {paper(row)} | {summary(row)} |"
             for row in ran(nb, rows, names.modules)]
    text = ("## Methods in this report\n\n| Method | Family | Paper | What it does |\n| --- | --- | --- | --- |\n"
            + "\n".join(lines))
    return [{"cell_type": "markdown", "id": "methods-here", "metadata": {}, "source": text}] if lines else []


def by_family(rows):
    return sorted(rows, key=lambda r: (list(ROOMS).index(r["family"]) if r["family"] in ROOMS else 99, r["name"]))


def reference(row, names):
    "A method's name as a link to its entry."
    place = f"{module_of(row)}.{entry_of(row, names.modules)}"
    return f"{{py:obj}}`{row['name']} <{place}>`" if place in names.full else f"`{row['name']}`"


def shown(row, books, used):
    "Links to the notebook that defines a method and to the reports that run it."
    own = own_notebook(row)
    return page_links([own] * (own in books) + used.get(row["name"], []), books)


def methods_page(rows, names, books, used):
    "Every method with paper, family, signals and where it is shown."
    lines = ["| Method | Family | Kind | Returns | Signals | Paper | Shown in | Atlas |", "|" + " --- |" * 8]
    for row in by_family(rows):
        name = reference(row, names)
        key = f'<a href="atlas.html#paper-{row["key"]}">{row["key"]}</a>' if has_key(row) else ""
        lines.append("| " + " | ".join([name, row["family"], row["kind"], row["returns"], words(row["signals"]),
                                        paper(row), shown(row, books, used), key]) + " |")
    head = (f"# Methods\n\n{len(rows)} methods are registered. Each passes the same conformance checks; *signals* are "
            "what it must be given, *atlas* is its row in the [atlas of papers](atlas.md).\n\n")
    box = ('<input type="search" class="filter" aria-label="Filter the methods" '
           'placeholder="Filter: a name, a signal, a word of a title">\n\n')
    table = "```{table}\n:class: catalogue\n:align: left\n\n" + "\n".join(lines) + "\n```\n"
    return head + (box + table if rows else "")


# Building


def site():
    "Write the source, run Sphinx with warnings as errors, check the links."
    write_site()
    doctrees = BUILD / "doctrees"
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-n", "-q", "-j", "auto",
               "-c", str(ROOT / "docs"), "-d", str(doctrees), str(SOURCE), str(BUILD / "html")]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        shutil.rmtree(doctrees, ignore_errors=True)  # so that the next build reads, and warns of, everything again
        sys.exit("the site has warnings")
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(BUILD / "html", PAGES)
    finish.finish(PAGES)
    links()


class Table(HTMLParser):
    "The rows of the tables in a piece of HTML."

    def __init__(self, text):
        super().__init__()
        self.rows, self.cell = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr": self.rows.append([])
        if tag in ("td", "th"): self.cell = True; self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"): self.cell = False

    def handle_data(self, data):
        if self.cell: self.rows[-1][-1] += data.strip().replace("|", "\\|")

    def markdown(self):
        "A markdown table without a DataFrame's unnamed index."
        rows = [row for row in self.rows if row]
        if rows and rows[0][0] == "": rows = [row[1:] for row in rows]
        if not rows: return ""
        return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]) + "\n"


def readme_text():
    "README.md as nbs/index.ipynb says it: the same filter, links as seen from the root."
    import nbformat
    from nbconvert import MarkdownExporter
    nb = readable(counted(json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))))
    nb["cells"] = [cell for cell in nb["cells"] if "remove-cell" not in cell["metadata"].get("tags", [])]
    for cell in nb["cells"]:
        if cell["cell_type"] != "code": continue
        if "remove-input" in cell["metadata"]["tags"]: cell["metadata"] |= {"transient": {"remove_source": True}}
        for data in (out["data"] for out in cell["outputs"] if "text/html" in out.get("data", {})):
            table = Table("".join(data["text/html"])).markdown()
            if table: data["text/markdown"] = table; del data["text/html"]
    exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    text, resources = exporter.from_notebook_node(nbformat.reads(json.dumps(nb), as_version=4))
    if resources.get("outputs"): raise ValueError("index.ipynb draws a figure: save it to figures/ and link to it")
    text = re.sub(r"\]\((?!\w+:|#|\.\./)([\w/-]+(?:\.ipynb|/))", r"](nbs/\1", text)
    text = re.sub(r"(\]\(|src=[\"'])\.\./", r"\1", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"<!-- Written by `make export` from nbs/index.ipynb: edit that. -->\n\n{text}\n"


def readme():
    "README, and before it the computed counts in the notebook that it is made from."
    path = NBS / "index.ipynb"
    nb = counted(json.loads(path.read_text(encoding="utf-8")))
    write(path, json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
    write(ROOT / "README.md", readme_text())


def broken_links(folder=PAGES):
    "Every (page, link) of a built site that leads to no file or to no anchor."
    return [(page, wrong.removeprefix("broken link ")) for page, wrong in finish.faults(folder)
            if wrong.startswith("broken link ")]


def links():
    found = finish.faults(PAGES)
    for page, wrong in found: print(f"{page}: {wrong}", file=sys.stderr)
    if found: sys.exit(f"{len(found)} faults in the site")


def tour():
    import tour as table
    table.write()


if __name__ == "__main__":
    commands = {"site": site, "readme": readme, "links": links, "tour": tour}
    if len(sys.argv) != 2 or sys.argv[1] not in commands: sys.exit(__doc__)
    commands[sys.argv[1]]()
