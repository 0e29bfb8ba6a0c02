"""The site: every notebook has its page, what is broken is refused, and no page asks for anything from outside."""
import html
import importlib.util
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from conftest import ROOT

spec = importlib.util.spec_from_file_location("batt_nb_site", ROOT/"environments"/"docs"/"build.py")
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)


def small(folder, *cells):
    """A folder with a front page and a room of one notebook."""
    (folder/"room").mkdir(parents=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Front")]), folder/"index.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A page"), *cells]), folder/"room"/"10_page.ipynb")
    return folder


def test_every_notebook_but_the_templates_has_a_page(tmp_path):
    site.write_site(ROOT/"nbs", tmp_path/"pages")
    pages = {p.relative_to(tmp_path/"pages").as_posix() for p in (tmp_path/"pages").rglob("*.ipynb")}
    for path in (ROOT/"nbs").rglob("*.ipynb"):
        name = path.relative_to(ROOT/"nbs").as_posix()
        if ".ipynb_checkpoints" in name or path.name.startswith("_"): continue
        assert (name.replace("00_overview", "index") in pages) != name.startswith("reports/"), name
    front = (tmp_path/"pages"/"index.ipynb").read_text(encoding="utf-8")
    for room in ("Tutorials <tutorials/index>", "Campaign <campaign/index>", "package", "api", "Benchmarks <benchmarks/index>"): assert room in front
    assert re.search(r"\[`charge_state`\]\(#campaign\.state\.\w+\) \| \w", (tmp_path/"pages"/"api.md").read_text(encoding="utf-8"))


def test_a_page_is_the_notebook_without_what_is_hidden():
    code = '#| export\ndef charge(t):\n    "Charge | passed."\n    return t'
    nb = new_notebook(cells=[new_code_cell("#| default_exp state"), new_code_cell("#| hide\nimport secret"), new_code_cell(code), new_code_cell("#| notest\ncharge(1)")])
    page, module, defined = site.to_page(nb)
    assert [c.source for c in page.cells] == [f"(state.{nb.cells[2].id})=", code.removeprefix("#| export\n"), "charge(1)"]
    assert (module, defined) == ("state", [("charge", "Charge | passed.", f"state.{nb.cells[2].id}")])
    assert r"Charge \| passed." in site.listing({module: defined})


def test_a_broken_notebook_stops_the_site(tmp_path):
    wrong = new_code_cell("1/0", outputs=[new_output("error", ename="ZeroDivisionError", evalue="", traceback=[])])
    with pytest.raises(SystemExit, match=f"10_page.ipynb.*{wrong.id}"): site.write_site(small(tmp_path/"a", wrong), tmp_path/"pages_a")
    with pytest.raises(SystemExit, match="10_page.ipynb"): site.write_site(small(tmp_path/"b", new_code_cell("#| export\ndef f(:")), tmp_path/"pages_b")
    folder = small(tmp_path/"c")
    (folder/"room"/"10_page.ipynb").write_text('{"cells": [', encoding="utf-8")
    with pytest.raises(SystemExit, match="10_page.ipynb"): site.write_site(folder, tmp_path/"pages_c")


def test_equations_need_no_script_and_a_wrong_one_leaves_the_site_as_it_was(tmp_path, capfd):
    pytest.importorskip("myst_nb", reason="the site's packages are not installed (make docs)")
    page = site.build(small(tmp_path/"good", new_markdown_cell(r"$x_2$ and $\tfrac12 \mathcal F \Big\langle$ and $$ \sigma = \sqrt{x} $$")), tmp_path/"work", tmp_path/"site").with_name("room")/"10_page.html"
    text = page.read_text(encoding="utf-8")
    assert text.count("<math") == 3 and "<mfrac>" in text and {"ℱ", "⟨"} <= set(html.unescape(text)) and "\\langle" not in text
    for made in (tmp_path/"site").rglob("*.html"):
        assert not re.search(r'<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//|<link[^>]*\srel="(?:stylesheet|preload)"[^>]*href="(?:https?:)?//', made.read_text(encoding="utf-8")), made
    with pytest.raises(SystemExit): site.build(small(tmp_path/"bad", new_markdown_cell(r"$\nosuchcommand$")), tmp_path/"work", tmp_path/"site")
    assert "nosuchcommand" in capfd.readouterr().err and page.read_text(encoding="utf-8") == text
