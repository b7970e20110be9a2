"""Sphinx's settings. `python docs/build.py site` writes what Sphinx reads and runs it."""

import importlib.util
import shutil
from pathlib import Path

project = "selectbench"
author = "The selectbench authors"
copyright = author
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton"]

nb_execution_mode = "off"  # pages show the outputs that the notebooks store
nb_merge_streams = True
nb_render_markdown_format = "myst"  # computed prose may hold tables and formulas
nb_output_stderr = "remove"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath", "tasklist"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
mathjax3_config = {"chtml": {"matchFontHeight": False, "scale": 1.08}}  # formulas as wide on every machine
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]

html_theme = "pydata_sphinx_theme"
html_title = "selectbench"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "logo": {"text": "selectbench"},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": {"**": ["page-toc"], "index": [], "atlas": [], "methods": []},
    "show_nav_level": 1,
    "navigation_depth": 3,
    "show_toc_level": 2,
    "header_links_before_dropdown": 7,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "start": [], "methods": [], "atlas": [], "contributing": []}
python_display_short_literal_types = True
add_module_names = False
toc_object_entries_show_parents = "hide"
copybutton_exclude = ".linenos, .gp, .go"
mathjax_path = "mathjax/tex-chtml.js"  # copied below, so that formulas need no network


def copy_mathjax(app, error):
    "MathJax's files from the installed package into the site."
    package = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    static = Path(app.outdir) / "_static" / "mathjax"
    if error or static.exists(): return
    for part in ("output/chtml", "input/tex/extensions", "a11y"): shutil.copytree(package / part, static / part)
    shutil.copy(package / "tex-chtml.js", static)


def setup(app):
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True}
