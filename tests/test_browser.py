"""The widgets in a real browser: JupyterLab on a small notebook, opened, a control moved, the picture changed, in both
themes, at 1,280 px, by keyboard. Skips where there is no chromium or no playwright; `make test-browser` installs both.

SELECTBENCH_SHOTS names a folder for screenshots to look at."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

SETUP = """
import torch
from sklearn.linear_model import LogisticRegression
from transformers import MambaConfig, MambaForCausalLM, OlmoeConfig, OlmoeForCausalLM
from selectbench.core.study import Study
from selectbench.core.task import Task
from selectbench.nn.trace import trace
from selectbench.pools.tables import digits
from selectbench.report import views
from selectbench.report.widgets import atlas, attention_view, explore, look, router_view
from selectbench.zoo.tokenizer import ByteTokenizer
pool, letters, text = digits(), ByteTokenizer(), "the cat sat on the mat"
task = Task.from_dataset(pool, LogisticRegression(max_iter=50), name="digits")
study = Study(task, ["k_center", "herding"], [20, 60], seeds=3)
torch.manual_seed(0)
few = dict(vocab_size=260, hidden_size=16, num_hidden_layers=2)
moe = OlmoeForCausalLM(OlmoeConfig(**few, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2,
                                   num_experts=4, num_experts_per_tok=2, pad_token_id=None)).eval()
mamba = MambaForCausalLM(MambaConfig(**few, state_size=4)).eval()
routed = trace(moe, torch.as_tensor(letters.encode(text))[None])
"""
CELLS = [SETUP, "explore(study, pool)",
         "look(views.cell_selection(study, 'k_center', 60), views.cell_pool(study, pool))",
         "router_view(routed, list(text))", "attention_view(mamba, text, letters)", "atlas()"]
PANELS = ("explore", "look", "router_view", "attention_view", "atlas")
LABS = {"notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}


def write(folder):
    "The notebook, and JupyterLab's settings for it, in `folder`."
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [],
              "source": source.strip()} for i, source in enumerate(CELLS)]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "work").mkdir()
    (folder / "work/panels.ipynb").write_text(json.dumps(notebook))
    for place, settings in LABS.items():
        path = folder / f"settings/@jupyterlab/{place}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))


def free_port():
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def asked(url, method="GET"):
    "Whether the server answers."
    with contextlib.suppress(OSError), urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5):
        return True
    return False


@contextlib.contextmanager
def jupyterlab(folder):
    "JupyterLab on `folder`: its address with the path left open. It is stopped, with its kernels, whatever happens."
    write(folder)
    port, token = free_port(), secrets.token_hex(16)
    at = lambda path: f"http://127.0.0.1:{port}/{path}?token={token}"
    dirs = {f"JUPYTER{name}_DIR": str(folder / place) for name, place in (
        ("_CONFIG", "config"), ("_RUNTIME", "runtime"), ("LAB_SETTINGS", "settings"), ("LAB_WORKSPACES", "spaces"))}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
               f"--ServerApp.root_dir={folder / 'work'}"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | dirs, stdout=log, stderr=log)
    try:
        for _ in range(100):
            if asked(at("api/status")): break
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(.2)
        yield at
    finally:
        asked(at("api/shutdown"), "POST")  # which ends the kernels too
        with contextlib.suppress(subprocess.TimeoutExpired): server.wait(10)
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    "The notebook in a browser of 1,280 px, every cell run."
    with jupyterlab(tmp_path_factory.mktemp("lab")) as at:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        opened(page, at("lab/tree/panels.ipynb"))
        yield page


def opened(page, address):
    "Open the notebook and run all of it; its errors if it does not come to its end."
    page.goto(address)
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.context?.sessionContext?.session?.kernel"
                           "?.connectionStatus == 'connected'", timeout=90_000)
    page.evaluate("() => {window.jupyterapp.commands.execute('notebook:run-all-cells')}")
    done = f"document.querySelectorAll('.sb-panel').length == {len(PANELS)}"
    failed = "document.querySelector('.jp-RenderedText pre .ansi-red-fg')"  # a traceback
    page.wait_for_function(f"{done} || {failed}", timeout=120_000)
    assert page.evaluate(done), page.locator(".jp-OutputArea-output").all_inner_texts()
    page.set_viewport_size({"width": 1280, "height": 5000})  # every panel in view, nothing scrolled away
    page.wait_for_timeout(500)


def shot(page, name, element=None):
    "A screenshot, where somebody wants to look at it."
    folder = os.environ.get("SELECTBENCH_SHOTS")
    if folder: (element or page).screenshot(path=Path(folder) / f"{name}.png")


def panel(page, name): return page.locator(".sb-panel").nth(PANELS.index(name))


def drawn(panel):
    "What a panel shows, controls apart."
    return panel.locator(".widget-html-content").evaluate_all("all => all.map(one => one.innerHTML)")


def changes(panel, act):
    "Whether what the panel shows is other after `act`, within some seconds."
    before = drawn(panel)
    act()
    for _ in range(100):
        if drawn(panel) != before: return True
        panel.page.wait_for_timeout(100)
    return False


def theme(page, name):
    "Change JupyterLab's theme, and wait until its sheet is there."
    page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name)
    page.wait_for_function("dark => document.body.dataset.jpThemeLight == dark", arg=str("Dark" not in name).lower())
    page.wait_for_timeout(700)


INKS = """element => {
  const seen = [], context = document.createElement("canvas").getContext("2d");
  const fill = colour => { context.fillStyle = colour; context.fillRect(0, 0, 1, 1) };
  const over = (colour, below) => { fill(`rgb(${below})`); fill(colour);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3) };
  const linear = v => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = rgb => { const [r, g, b] = rgb.map(linear); return .2126 * r + .7152 * g + .0722 * b };
  const ground = node => { const own = getComputedStyle(node).backgroundColor;
    return over(own, node.parentElement ? ground(node.parentElement) : [255, 255, 255]) };
  for (const node of element.querySelectorAll("svg, th, td, p, .widget-label, select, input, button")) {
    const a = light(over(getComputedStyle(node).color, ground(node))), b = light(ground(node));
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (node.getClientRects().length) seen.push([contrast, node.tagName, node.innerText]) }
  return seen }"""


def test_every_panel_is_drawn(page):
    "Pictures in each, no error; nothing runs over the edge at 1,280 px."
    for name in PANELS:
        one = panel(page, name)
        assert name == "atlas" or one.locator("svg").count() >= 2, name
        assert one.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), f"{name} is wider than its place"
        edge = one.evaluate("e => e.getBoundingClientRect().right") + 1
        assert max(one.locator("svg, select, button, input").evaluate_all(
            "all => all.map(e => e.getBoundingClientRect().right)")) <= edge, name


MOVED = {"explore": ("baseline", "cell", "seed"), "look": ("show", "seed of the random pick"),
         "router_view": ("layer",), "attention_view": ("relevance by", "layer"), "atlas": ("family", "paper")}


@pytest.mark.parametrize("name, label", [(name, label) for name, labels in MOVED.items() for label in labels])
def test_a_control_moves_and_the_picture_changes(page, name, label):
    "By keyboard: an arrow on a focused control."
    control = panel(page, name).get_by_label(label, exact=True)
    control.focus()
    assert changes(panel(page, name), lambda: control.press("ArrowDown")), f"{label} of {name} changed nothing"


def test_what_is_typed_is_read(page):
    "A text and a search."
    text = panel(page, "attention_view").get_by_label("text", exact=True)
    text.fill("a dog lay under the tree")
    assert changes(panel(page, "attention_view"), lambda: text.press("Enter"))
    papers = panel(page, "atlas")
    papers.get_by_label("family", exact=True).select_option("any")
    search = papers.get_by_label("search", exact=True)
    assert changes(papers, lambda: search.fill("selection for language models via importance resampling"))
    papers.get_by_text("dsir(").first.wait_for(timeout=10_000)
    assert "nbs/data/importance.ipynb" in papers.inner_text()


def test_a_click_opens_the_cell(page):
    "The selection behind a cell of the matrix, and the list of cells follows."
    study = panel(page, "explore")
    button = study.get_by_title("herding, digits, 60")
    assert changes(study, button.click)
    said = study.get_by_label("cell", exact=True).locator("option:checked").inner_text()
    assert said.replace("\xa0", " ") == "digits, herding, 60"
    assert "herding chose 60 of digits" in study.inner_text()


def test_keyboard_reaches_every_control(page):
    "Tab goes through the controls of each panel in their order, and each has a name."
    for name in PANELS:
        controls = panel(page, name).locator("select, input")
        named = controls.evaluate_all("all => all.map(e => e.labels?.[0]?.innerText ?? '')")
        assert all(named), f"{name}: {named}"
        controls.first.focus()
        met = [page.evaluate("document.activeElement.labels?.[0]?.innerText")]
        for _ in named[1:]:
            page.keyboard.press("Tab")
            met.append(page.evaluate("document.activeElement.labels?.[0]?.innerText"))
        assert met == named, name


@pytest.mark.parametrize("name", ["JupyterLab Light", "JupyterLab Dark"])
def test_readable_in_both_themes(page, name):
    "Text and ink stand out from what is behind them by 4.5 to 1 or more; pictures have no black or grey of their own."
    theme(page, name)
    for place in PANELS:
        shot(page, f"{name.split()[1].lower()}_{place}", panel(page, place))
        weak = [found for found in panel(page, place).evaluate(INKS) if found[0] < 4.5]
        assert not weak, f"{place}: {weak}"
        assert not panel(page, place).locator("svg").evaluate_all(
            r"all => all.some(one => /#([0-9a-f]{2})\1\1\b/.test(one.outerHTML))")
