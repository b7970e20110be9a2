"""Sphinx's settings. `python docs/build.py site` writes what Sphinx reads and runs it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import formulas

project = "selectbench"
author = "The selectbench authors"
copyright = author
extensions = ["myst_nb", "sphinx_copybutton"]

nb_execution_mode = "off"  # pages show the outputs that the notebooks store
nb_merge_streams = True
nb_render_markdown_format = "myst"  # computed prose may hold tables and formulas
nb_output_stderr = "remove"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath", "tasklist"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]

html_theme = "pydata_sphinx_theme"
html_title = "selectbench"
html_static_path = ["_static", str(formulas.stylesheet())]
html_css_files = ["formulas.css", "site.css"]
html_math_renderer = "mathml"
html_js_files = ["first.js", "site.js"]
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


def setup(app):
    app.add_config_value("formulas_are", Path(formulas.__file__).read_text(encoding="utf-8"), "html")  # else stale
    app.add_html_math_renderer("mathml", (formulas.inline, None), (formulas.display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
