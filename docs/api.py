"""The API reference, read from the source without importing it: signatures, docstrings, parameter tables."""

import ast
import inspect
import io
import re
import tokenize
from copy import deepcopy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "selectbench"
DEF = (ast.FunctionDef, ast.AsyncFunctionDef)


def modules():
    "Dotted name -> path of every exported module, in the package's own order."
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name.startswith("_"): continue
        found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


class Module:
    "One exported module as data: its summary, its public names, and where each is defined."

    def __init__(self, name, path):
        self.name, self.source = name, path.read_text(encoding="utf-8")
        tree = ast.parse(self.source)
        self.summary = (ast.get_docstring(tree) or "").strip()
        self.comments = comments(self.source)
        self.nodes, self.public = {}, []
        for node in tree.body:
            for key in targets(node): self.nodes[key] = node
            if "__all__" in targets(node): self.public = ast.literal_eval(node.value)
        self.attached = [pair for node in tree.body for pair in attachments(node)]
        match = re.search(r"^# %% (?:\.\./)+nbs/(\S+\.ipynb)", self.source, re.M)
        self.notebook = match and match[1]

    def members(self, name, node):
        "Public methods and properties of a class as (name, kind, node): those in its body, those given to it later."
        found = [(item.name, kind_of(item), item) for item in node.body if isinstance(item, DEF)]
        for goal, value in self.attached:
            if goal.value.id != name: continue
            wrap = ast.unparse(value.func) if isinstance(value, ast.Call) else "method"
            inner = value.args[0] if isinstance(value, ast.Call) and value.args else value
            item = self.nodes.get(getattr(inner, "id", None))
            if isinstance(item, DEF): found.append((goal.attr, wrap, item))
        return [row for row in found if not row[0].startswith("_") and ast.get_docstring(row[2])]

    def registered(self, method):
        "The name of the function or class that is registered as `method`."
        for key, node in self.nodes.items():
            for call in getattr(node, "decorator_list", []):
                given = {k.arg: k.value for k in getattr(call, "keywords", [])}
                registers = "paper" in given or unparse(getattr(call, "func", None)) == "method"
                if registers and ast.unparse(given.get("name", ast.Constant(key))) == repr(method): return key
        return method

    def objects(self):
        "Public names that are functions, classes or constants defined here, with their nodes."
        return [(name, self.nodes[name]) for name in self.public if name in self.nodes]


def targets(node):
    "Names that a top-level statement defines."
    if isinstance(node, (*DEF, ast.ClassDef)): return [node.name]
    if isinstance(node, ast.AnnAssign): return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign): return [t.id for t in node.targets if isinstance(t, ast.Name)]
    return []


def attachments(node):
    "Pairs (Class.name, value) of a statement like `Class.a, Class.b = f, classmethod(g)`."
    if not isinstance(node, ast.Assign): return []
    parts = lambda x: x.elts if isinstance(x, ast.Tuple) else [x]
    pairs = zip(parts(node.targets[0]), parts(node.value), strict=False)
    return [(a, b) for a, b in pairs if isinstance(a, ast.Attribute) and isinstance(a.value, ast.Name)]


def kind_of(node):
    "What a function in a class body is: method, property, classmethod or staticmethod."
    names = [unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list]
    found = {"cached_property": "property"}.get(names[0], names[0]) if names else ""
    return found if found in ("property", "classmethod", "staticmethod") else "method"


def comments(source):
    "Line -> the comment that ends it."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def note(module, line, taken):
    "The comment beside a parameter, unless another parameter stands on the same line."
    return "" if line in taken else module.comments.get(line, "")


def parameters(module, node, drop_self=False):
    "Rows (name, type, default, note) of a function's parameters; name carries its stars."
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    rows = [*zip(plain, [""] * len(plain), defaults, strict=True)][1 if drop_self and plain else 0:]
    if args.vararg: rows.append((args.vararg, "*", None))
    rows += [(arg, "", default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg: rows.append((args.kwarg, "**", None))
    lines = [arg.end_lineno if default is None else default.end_lineno for arg, _, default in rows]
    taken = {line for line in lines if lines.count(line) > 1 and len(rows) > 1}
    return [(star + arg.arg, unparse(arg.annotation), unparse(default), note(module, line, taken))
            for (arg, star, default), line in zip(rows, lines, strict=True)]


def attributes(module, node):
    "Rows (name, type, default, note) of a class's annotated fields."
    return [(item.target.id, unparse(item.annotation), unparse(item.value), note(module, item.end_lineno, ()))
            for item in node.body if isinstance(item, ast.AnnAssign) and not item.target.id.startswith("_")]


def unparse(node): return "" if node is None else ast.unparse(node)


def signature(node, drop_self=False):
    "The argument list without annotations, which the table gives."
    args = deepcopy(node.args)
    for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
        if arg: arg.annotation = None
    if drop_self and (args.posonlyargs or args.args): del (args.posonlyargs or args.args)[0]
    return "(" + ast.unparse(args) + ")"


def cell(text): return f"`{text}`".replace("|", "\\|") if text else ""


def table(rows):
    "A markdown table of parameter rows; columns that would be empty are left out."
    if not rows: return ""
    heads = ["Parameter", "Type", "Default", "What it is"]
    made = [[cell(name), cell(kind), cell(default), text.replace("|", "\\|")] for name, kind, default, text in rows]
    keep = [i for i in range(4) if i == 0 or any(row[i] for row in made)]
    if keep == [0]: return ""
    lines = [[heads[i] for i in keep], ["---"] * len(keep), *([row[i] for i in keep] for row in made)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def doc(node, link=str):
    "A docstring as markdown."
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    return link(re.sub(r"(?m)^(#+ )", r"\\\1", text))


def returns(node, link=str):
    kind = unparse(getattr(node, "returns", None))
    return link(f"**Returns** `{kind}`") if kind and kind != "None" else ""


def decorated(node, name): return any(unparse(d).split("(")[0].split(".")[-1] == name for d in node.decorator_list)


def directive(kind, head, body, ticks=3):
    "A MyST directive; blank parts of the body are skipped."
    fence = "`" * ticks
    return f"{fence}{{py:{kind}}} {head}\n" + "\n\n".join(part for part in body if part) + f"\n{fence}"


def member(module, name, kind, node, link):
    "A public method or property of a class."
    if kind == "property": return directive(kind, name, [doc(node, link), returns(node, link)])
    bound = kind != "staticmethod"
    rows = [row for row in parameters(module, node, drop_self=bound) if any(row[1:])]
    return directive(kind, name + signature(node, drop_self=bound), [doc(node, link), table(rows), returns(node, link)])


def class_entry(module, name, node, link, extra=""):
    "A class: constructor, fields or parameters, public members."
    fields = attributes(module, node)
    start = next((item for item in node.body if isinstance(item, DEF) and item.name == "__init__"), None)
    rows, head = fields, ""
    if start: rows, head = parameters(module, start, drop_self=True), signature(start, drop_self=True)
    elif fields and decorated(node, "dataclass"):
        rows = [(n, t, "..." if d.startswith("field(") else d, about) for n, t, d, about in fields]
        head = "(" + ", ".join(f"{n}={d}" if d else n for n, _, d, _ in rows) + ")"
    members = [member(module, *row, link) for row in module.members(name, node)]
    return directive("class", name + head, [doc(node, link), extra, table(rows), *members], ticks=4)


def entry(module, name, node, link, extra="", known=None):
    "The reference entry of one public name; `known` gives (type, note) for parameters that carry none."
    if isinstance(node, ast.ClassDef): return class_entry(module, name, node, link, extra)
    if isinstance(node, DEF):
        fill = lambda row: (known or {}).get(row[0], ("", ""))
        rows = [(row[0], row[1] or fill(row)[0], row[2], row[3] or fill(row)[1]) for row in parameters(module, node)]
        return directive("function", name + signature(node), [doc(node, link), extra, table(rows),
                                                             returns(node, link)])
    return directive("data", name, [module.comments.get(node.end_lineno, "")])


def page(module, link=str, facts=None, known=None):
    """The reference page of one module as MyST markdown.

    `facts` maps a name to a line of its own (paper, family); `known` maps a parameter of such a function to its
    (type, note) where it has none."""
    facts = facts or {}
    entries = [entry(module, name, node, link, facts.get(name, ""), known if name in facts else None)
               for name, node in module.objects()]
    up = "../" * module.name.count(".")
    where = f"Explained, tested and shown on data in [its notebook]({up}{module.notebook})." if module.notebook else ""
    short = module.name.removeprefix("selectbench.")
    head = f"# {short}\n\n```{{py:module}} {module.name}\n```\n\n{link(module.summary)}"
    return "\n\n".join(part for part in [head, where, *entries] if part) + "\n"
