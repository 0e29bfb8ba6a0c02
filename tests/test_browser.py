"""The report pages as a person meets them: in Chromium, in real time, with the network off."""
import io
import shutil

import numpy as np
import pytest

from batt_nb.campaign import Campaign
from batt_nb.report import pages, report
from conftest import ROOT

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package chromium)")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """The sample campaign's reports, made from its raw files."""
    folder = tmp_path_factory.mktemp("sample")/"lfp-twin"
    shutil.copytree(ROOT/"data_samples"/"lfp-twin", folder, ignore=shutil.ignore_patterns("store", "reports", "campaign.h5"))
    campaign = Campaign.open(folder).ingest(progress=False)
    report(campaign, templates=["05_overview_campaign", "90_recovered_truth"])
    report(campaign, templates=["10_first_look_echem", "20_first_look_xas", "30_first_look_xrd", "40_first_look_xct", "50_first_look_nmr"], techniques=["echem_A", "xas", "xrd", "xct", "nmr"])
    index = report(campaign, templates=["60_cleaning_xas", "64_cleaning_xct"], techniques=["xas", "xct"])
    assert {p["status"] for p in pages(index)} == {"made"}, [p["error"] for p in pages(index)]
    return index


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


@pytest.fixture
def page(browser):
    """A page without network, which remembers what it complained of and asked for."""
    context = browser.new_context(viewport={"width": 1200, "height": 1000}, offline=True)
    page = context.new_page()
    page.complaints, page.asked = [], []
    page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.complaints.append(str(e)))
    page.on("request", lambda r: page.asked.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
    yield page
    context.close()


def pixels(locator):
    from PIL import Image
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB")).astype(int)


def drawn(page):
    """Canvases of plots that hold more than one color."""
    canvases = page.locator("canvas")
    return sum(pixels(canvases.nth(i)).std() > 3 for i in range(canvases.count()) if canvases.nth(i).is_visible() and canvases.nth(i).bounding_box()["height"] > 60)


@pytest.mark.parametrize("name", ["overview", "recovered", "first_look_echem_A", "first_look_xas", "first_look_xrd", "first_look_xct", "first_look_nmr", "cleaning_xas", "cleaning_xct"])
def test_a_page_shows_its_plots_and_needs_no_network(index, page, name):
    page.goto(f"file://{index.parent/name}.html")
    page.wait_for_selector("canvas", state="attached", timeout=30_000)
    page.wait_for_timeout(3000)
    assert page.complaints == [] and page.asked == []
    assert drawn(page) >= 3


@pytest.mark.parametrize("name", ["first_look_echem_A", "first_look_xas", "first_look_xrd", "first_look_xct", "first_look_nmr", "cleaning_xas", "cleaning_xct"])
def test_moving_the_slider_changes_the_picture(index, page, name):
    page.goto(f"file://{index.parent/name}.html")
    handle = page.locator(".noUi-handle").first
    handle.wait_for(timeout=30_000)
    handle.scroll_into_view_if_needed()
    page.wait_for_timeout(1500)
    figure = page.locator(".bn-figure", has=page.locator(".noUi-handle")).first
    before = pixels(figure)
    if name.endswith("xct"): assert (before.max(axis=2) < 100).mean() > 0.08 # dark pores: a picture, where an empty frame has letters and lines alone
    handle.focus()
    for _ in range(3): page.keyboard.press("ArrowRight")
    page.wait_for_timeout(700)
    after = pixels(figure)
    assert before.shape == after.shape and (np.abs(after - before).sum(axis=2) > 30).sum() > 200


def test_the_code_is_hidden_until_it_is_asked_for(index, page):
    page.goto(f"file://{index.parent/'first_look_xas'}.html")
    code = page.get_by_text("operando_contour(", exact=False).first
    assert not code.is_visible()
    page.locator("label.bn-toggle").click()
    page.wait_for_timeout(300)
    assert code.is_visible()


def test_the_index_leads_to_every_page(index, page):
    page.goto(f"file://{index}")
    links = [a.get_attribute("href") for a in page.locator("a").all()]
    for p in pages(index): assert f"{p['page']}.html" in links
    page.get_by_role("link", name="First look: xas").first.click()
    assert page.locator("h1").first.inner_text().startswith("X-ray absorption")
