"""Sphinx: pages that need nothing from outside. Equations become MathML while the site is built, so that they need neither a script nor a font."""
import re
from configparser import ConfigParser
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from latex2mathml.symbols_parser import convert_symbol
from sphinx.util.logging import getLogger

settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(Path(__file__).resolve().parents[2]/"settings.ini", encoding="utf-8")
about = settings["DEFAULT"]

project, author, version, copyright = about["title"], about["author"], about["version"], about["copyright"]
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_ipywidgets_js = {} # no page has a living widget
myst_enable_extensions = ["dollarmath", "amsmath"]
html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_sidebars = {"api": []}
html_copy_source = False
html_show_search_summary = False # a browser does not let a page read files
html_math_renderer = "mathml"
html_context = {"default_mode": "auto"} # light or dark, as the reader's system is
html_theme_options = {
    "logo": {"text": project},
    "github_url": about["git_url"],
    "header_links_before_dropdown": 10,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}


def symbol(found):
    """What stands for a command that the converter left as it was, as it does in \\Big\\langle."""
    if not (code := convert_symbol(found[1])): raise ValueError(f"{found[1]} is unknown")
    return f">&#x{code};<"


def mathml(self, node, display):
    """Write one equation; what cannot be read is a warning, and so stops the build."""
    tex = re.sub(r"\\(math[a-z]+|boldsymbol)\s+(\w|\\[A-Za-z]+)", r"\\\1{\2}", node.astext()) # the converter wants \mathcal{F}
    try: self.body.append(re.sub(r">(\\[A-Za-z]+)<", symbol, convert(tex, display=display)))
    except Exception as e: getLogger(__name__).warning("equation %s: %s", tex, e or type(e).__name__, location=node)
    raise SkipNode


def setup(app):
    inline, block = ((lambda self, node, d=d: mathml(self, node, d), None) for d in ("inline", "block"))
    app.add_html_math_renderer("mathml", inline, block)
