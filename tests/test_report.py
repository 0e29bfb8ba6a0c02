"""Reports: what is skipped, what fails, what is killed, and text that stays text."""
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest

from batt_nb.campaign import Campaign
from batt_nb.core import BattError
from batt_nb.report import pages, report
from test_campaign import make_campaign, spectrum


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The tiny campaign and the index of its reports."""
    folder = make_campaign(tmp_path_factory.mktemp("reported"))
    return folder, report(Campaign.open(folder).ingest(progress=False))


def stamps(index): return {p.name: p.stat().st_mtime_ns for p in index.parent.glob("*.html") if p.name != "index.html"}


def template(path, *cells, parameters='folder = "."\nraw_root = None\ntechnique = ""'):
    """A template with a parameters cell and more cells."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A page"), first, *map(nbformat.v4.new_code_cell, cells)],
                                  metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(nb, path)
    return path


def test_every_fitting_page_is_made(reported):
    _, index = reported
    made = {p["page"]: p["status"] for p in pages(index)}
    assert made == {"overview": "made", "first_look_echem": "made", "first_look_xas": "made", "cleaning_xas": "made"}, pages(index)
    text = index.read_text(encoding="utf-8")
    for name in made: assert f'{name}.html' in text and (index.parent/f"{name}.html").exists()
    assert "data:image/png;base64," in text and "spectra" in text


def test_names_with_markup_are_text_on_every_page(reported):
    _, index = reported
    for page in index.parent.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        for markup in ("<script>alert(1)", "<img src=x", "Zelle <b>"): assert markup not in text, (page.name, markup)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in index.read_text(encoding="utf-8")
    xas = (index.parent/"first_look_xas.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;1&lt;/b&gt;" in xas and "&lt;img src=x onerror=alert(1)&gt;" in xas


def test_pages_need_nothing_from_outside(reported):
    _, index = reported
    for page in index.parent.glob("*.html"):
        text = re.sub(r"<script\b.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.S) # what scripts ask for is seen in the browser's test
        for outside in ('src="http', "src='http", 'rel="stylesheet" href="http', "@import url(http"): assert outside not in text, (page.name, outside)


def test_what_is_unchanged_is_skipped_and_what_changed_is_made_anew(reported):
    folder, index = reported
    before = stamps(index)
    report(Campaign.open(folder).ingest(progress=False))
    assert stamps(index) == before
    spectrum(folder/"raw"/"scan 7 <b>.xdi", 59)
    report(Campaign.open(folder).ingest(progress=False))
    after = stamps(index)
    assert after["first_look_xas.html"] > before["first_look_xas.html"] and after["first_look_echem.html"] == before["first_look_echem.html"]


def test_a_page_that_fails_is_shown_and_the_others_are_made(tmp_path):
    folder = make_campaign(tmp_path)
    bad = template(tmp_path/"bad_xas.ipynb", "raise ValueError('<b>no such peak</b>')")
    good = template(tmp_path/"good_xas.ipynb", "1 + 1")
    index = report(Campaign.open(folder).ingest(progress=False), templates=[bad, good])
    status = {p["template"]: p["status"] for p in pages(index)}
    assert status["bad_xas"] == "failed" and status["good_xas"] == "made"
    failed = next(p for p in pages(index) if p["template"] == "bad_xas")
    text = (index.parent/f"{failed['page']}.html").read_text(encoding="utf-8")
    assert "no such peak" in text and "<b>no such peak</b>" not in text
    assert "no such peak" in index.read_text(encoding="utf-8")


def test_a_template_without_the_parameters_is_not_run_on_the_wrong_campaign(tmp_path):
    folder = make_campaign(tmp_path)
    wrong = template(tmp_path/"wrong_xas.ipynb", "print(folder)", parameters='campaign = "other"')
    index = report(Campaign.open(folder).ingest(progress=False), templates=[wrong])
    page = next(p for p in pages(index) if p["template"] == "wrong_xas")
    assert page["status"] == "failed" and "parameter" in page["error"]


def test_an_unknown_template_or_technique_is_refused(tmp_path):
    campaign = Campaign.open(make_campaign(tmp_path)).ingest(progress=False)
    with pytest.raises(BattError, match="xsa"): report(campaign, techniques=["xsa"])
    with pytest.raises(BattError): report(campaign, templates=["no_such_template"])


def test_a_report_killed_half_way_leaves_whole_pages_and_the_next_run_resumes(tmp_path):
    folder = make_campaign(tmp_path)
    code = f"""
        from batt_nb.campaign import Campaign
        from batt_nb.report import report
        report(Campaign.open({str(folder)!r}).ingest(progress=False))
    """
    p = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not list((folder/"reports").glob("*.json")) and time.monotonic() < deadline: time.sleep(0.2)
    p.send_signal(signal.SIGKILL); p.wait()
    done = {f.stem: f.stat().st_mtime_ns for f in (folder/"reports").glob("*.html")}
    assert 1 <= len(done) < 5 and not list((folder/"reports").glob("*.part"))
    for name in done: assert (folder/"reports"/f"{name}.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    campaign = Campaign.open(folder)
    assert campaign["xas"].sizes["time"] == 6
    index = report(campaign.ingest(progress=False))
    assert all(p["status"] == "made" for p in pages(index)) and len(pages(index)) == 4
    first = next(iter(p["page"] for p in pages(index) if p["page"] in done))
    assert (folder/"reports"/f"{first}.html").stat().st_mtime_ns == done[first]


def test_templates_travel_with_the_package():
    import batt_nb.reports
    names = sorted(p.name for p in Path(next(iter(batt_nb.reports.__path__))).glob("[0-9]*.ipynb"))
    assert len(names) >= 6
    for name in names:
        nb = nbformat.read(Path(next(iter(batt_nb.reports.__path__)))/name, 4)
        assert sum("parameters" in c.metadata.get("tags", []) for c in nb.cells) == 1, name


def test_pages_do_not_depend_on_what_else_the_process_has_imported():
    code = "from batt_nb.report import bokeh_js; a = bokeh_js(); import panel; panel.extension(); print(bokeh_js() == a, '</script' in a[a.index('>'):a.rindex('</script>')].replace('</script>\\n<script', ''))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True", "False"]
