"""Keys of the cached functions that notebooks define, their exported cells run one by one: `shell` or `kernel`."""

import json
import sys
from pathlib import Path

REPORT = """
import json as _json
from selectbench.core.cache import CachedFunction as _CF
from selectbench.core.digest import source_digest as _sd
print("KEYS" + _json.dumps({f.label: [f.version, _sd(f.__wrapped__)] for f in list(globals().values())
                            if isinstance(f, _CF) and f.__module__ == "__main__"}))
"""


def exported(path):
    "The sources of the cells that make the module."
    cells = json.loads(Path(path).read_text())["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return [s for s in sources if s.startswith(("#| export", "#| default_exp"))]


def by_shell(sources):
    "What the last cell prints, in execnb's shell."
    from execnb.shell import CaptureShell
    shell = CaptureShell()
    for s in sources:
        out = shell.run(s)
        if shell.exc: raise shell.exc
    return "".join(o.get("text", "") if isinstance(o.get("text", ""), str) else "".join(o["text"]) for o in out)


def by_kernel(sources):
    "What the last cell prints, in a Jupyter kernel."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    NotebookClient(nb, timeout=120, kernel_name="python3").execute()
    return "".join(o.get("text", "") for o in nb.cells[-1].outputs)


if __name__ == "__main__":
    how, *paths = sys.argv[1:]
    text = {p: {"shell": by_shell, "kernel": by_kernel}[how]([*exported(p), REPORT]) for p in paths}
    print(json.dumps({p: json.loads(t[t.index("KEYS") + 4:]) for p, t in text.items()}))
