"""Painting and looking in a real browser, network off: the mouse's strokes are the labels, undo takes them back, panes follow clicks and sliders, the page complains of nothing."""
import io
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from conftest import ROOT

pytest.importorskip("sklearn")

from batt_nb.cleaning.scribbles import Scribbler, brush_mask
from batt_nb.cleaning.volume_views import view_volume

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="Chromium is not installed (apt install chromium, or set CHROMIUM)")
NASTY = "<img src=x onerror=\"document.title='hacked'\"> & rim"
N, M = 160, 200 # rows, columns


def volume():
    """Three slices of vertical stripes: 0, 0.5, 1."""
    columns = np.repeat([0., .5, 1., .5], 50)
    grey = np.stack([np.broadcast_to(np.roll(columns, 17*k), (N, M)) for k in range(3)]) + .05*np.random.default_rng(0).normal(size=(3, N, M))
    at = {d: (d, (np.arange(n) + .5)*s, {"units": "µm", "long_name": d}) for d, n, s in zip("zyx", (3, N, M), (.8, .4, .4), strict=True)}
    return xr.DataArray(grey.astype("f4"), at, ("z", "y", "x"), "image")


def blobs():
    r = np.random.default_rng(1)
    grey = xr.DataArray(r.uniform(size=(24, 32, 40)).astype("f4"), {d: (d, (np.arange(n) + .5)*.5, {"units": "µm", "long_name": d}) for d, n in zip("zyx", (24, 32, 40), strict=True)}, ("z", "y", "x"))
    grey[12:] += 1
    return grey, xr.DataArray(np.where(grey > 1, 1, 0), grey.coords, grey.dims, attrs={"codes": "{'pore': 0, 'solid': 1}"})


@pytest.fixture(scope="module")
def served():
    """The widgets on a server in this process, so that a test sees what the server holds; each page gets its own scribbler."""
    import panel as pn
    made = []
    def large():
        made.append(Scribbler(xr.DataArray(np.random.default_rng(0).uniform(size=(1200, 1600)).astype("f4"), dims=("y", "x")), ["a", "b"], size=400))
        return made[-1].panel()
    def paint():
        made.append(Scribbler(volume(), {"pore": 0, NASTY: 1, "NMC": 2}, width=7, size=400))
        return made[-1].panel()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = pn.serve({"paint": paint, "large": large, "look": lambda: view_volume(*blobs())}, port=port, address="127.0.0.1", show=False, threaded=True, verbose=False, websocket_origin=f"127.0.0.1:{port}")
    end = time.time() + 30
    while time.time() < end:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0: break
        time.sleep(.1)
    yield f"http://127.0.0.1:{port}/", made
    server.stop()


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


@pytest.fixture
def page(browser):
    """A page that reaches nothing but this machine, and at its end has complained of nothing."""
    page = browser.new_page(viewport={"width": 1100, "height": 860})
    page.complaints = complaints = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: complaints.append(f"error in a script: {e}"))
    page.on("requestfailed", lambda r: complaints.append(f"asked for {r.url}"))
    page.route(lambda u: not u.startswith(("http://127.0.0.1", "data:", "blob:")), lambda r: r.abort())
    yield page
    page.close()
    assert complaints == []


FRAMES = """() => [...Bokeh.index.query(v => v.model.type == 'Figure')].map(v => { const c = v.canvas_view.el.getBoundingClientRect(), b = v.frame.bbox
    return [v.model.left[0].axis_label[0], c.left + b.left, c.top + b.top, b.width, b.height] })"""


def frames(page):
    """Where the image of each pane lies on the screen."""
    return {name: box for name, *box in page.evaluate(FRAMES)}


def until(page, true, seconds=15):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "it did not happen"
        page.wait_for_timeout(30)


def pixels(page, box):
    from PIL import Image
    x, y, w, h = box
    return np.asarray(Image.open(io.BytesIO(page.screenshot(clip={"x": x, "y": y, "width": w, "height": h}))).convert("RGB")).astype(int)


BRUSH = "() => [...Bokeh.index.query(v => v.model.type == 'Figure')][0].model.renderers.map(r => r.glyph).find(g => g.type == 'MultiLine').tags"


def choose(page, name, code):
    """Click a class and wait until the brush has it."""
    page.get_by_role("button", name=name).click()
    until(page, lambda: page.evaluate(BRUSH)[1] == code)


def other(page, box, before, share, much=40):
    """Wait until more than a share of the pixels are others."""
    until(page, lambda: (np.abs(pixels(page, box) - before).sum(-1) > much).mean() > share)


class Hand:
    """A mouse that knows rows and columns."""
    def __init__(self, page, box, shape=(N, M)): self.page, self.box, self.shape = page, box, shape
    def at(self, row, column): return self.box[0] + self.box[2]*(column + .5)/self.shape[1], self.box[1] + self.box[3]*(row + .5)/self.shape[0]

    def drag(self, *points, rest=0, release=True):
        self.page.mouse.move(*self.at(*points[0])); self.page.mouse.down(); self.page.wait_for_timeout(rest)
        for p in points[1:]: self.page.mouse.move(*self.at(*p), steps=5)
        if release: self.page.mouse.up()


def opened(page, served):
    url, made = served
    n = len(made)
    page.goto(f"{url}paint"); page.locator(".bk-Figure").first.wait_for(timeout=60_000)
    until(page, lambda: len(made) > n and len(frames(page)) == 1)
    hand = Hand(page, frames(page)["y"])
    until(page, lambda: pixels(page, hand.box).std() > 40) # the image is there
    return made[-1], hand


def test_what_the_mouse_paints_is_labelled_and_nothing_else(page, served):
    s, hand = opened(page, served)
    blank = pixels(page, hand.box)
    hand.drag((30, 20), (30, 120))
    until(page, lambda: len(s.strokes) == 1)
    labels = s.labels
    np.testing.assert_array_equal(labels[1], np.where(brush_mask([(30, 20), (30, 120)], 7, (N, M)), 0, 255)) # the middle slice is shown first
    assert (labels[[0, 2]] == 255).all()
    other(page, hand.box, blank, .015); page.mouse.move(5, 5); page.wait_for_timeout(200)
    changed = (np.abs(pixels(page, hand.box) - blank).sum(-1) > 40).nonzero() # what is seen is what is labelled
    unit = hand.box[3]/N
    seen = [(changed[0].min()/unit, changed[0].max()/unit), (changed[1].min()/unit, changed[1].max()/unit)]
    np.testing.assert_allclose(seen, [(27, 34), (17, 124)], atol=1.5)

    choose(page, "rim", 1)
    hand.drag((60, 40), (100, 40), rest=400) # a hand that rests first
    until(page, lambda: len(s.strokes) == 2)
    hand.drag((120, 150), (120, 260)) # let go outside of the image
    until(page, lambda: len(s.strokes) == 3)
    hand.page.mouse.click(*hand.at(140, 20)) # a dot
    until(page, lambda: len(s.strokes) == 4)
    expected = labels.values.copy()
    for points in ([(60, 40), (100, 40)], [(120, 150), (120, 260)], [(140, 20)]): expected[1][brush_mask(points, 7, (N, M))] = 1
    np.testing.assert_array_equal(s.labels, expected)

    for n in (3, 2): page.get_by_role("button", name="Undo").click(); until(page, lambda n=n: len(s.strokes) == n)
    assert (s.labels[1].values[115:] == 255).all() and (s.labels[1].values[60:100, 40] == 1).all()
    page.get_by_role("button", name="Redo").click(); until(page, lambda: len(s.strokes) == 3)
    choose(page, "Erase", 255)
    hand.drag((30, 60), (30, 70)); until(page, lambda: len(s.strokes) == 4)
    assert (s.labels[1].values[27:34, 60:71] == 255).all() and (s.labels[1].values[30, 20:55] == 0).all()
    assert NASTY in page.locator("table").inner_text() and page.title() != "hacked" and page.locator("img").count() == 0


def test_strokes_belong_to_the_slice_they_were_painted_on(page, served):
    s, hand = opened(page, served)
    first = pixels(page, hand.box)
    page.locator(".noUi-handle").first.focus(); page.keyboard.press("ArrowRight")
    page.get_by_text("2 (z = 2 µm), 3 of 3").wait_for()
    other(page, hand.box, first, .2) # another picture
    assert frames(page)["y"] == hand.box and page.evaluate(BRUSH)[0] == 2 # in the same place
    for k in range(6): # as fast as a mouse can
        page.mouse.move(*hand.at(20 + 20*k, 20)); page.mouse.down(); page.mouse.move(*hand.at(20 + 20*k, 150), steps=2); page.mouse.up()
    until(page, lambda: len(s.strokes) == 6)
    assert s.labelled == [2] and all((s.labels[2].values[20 + 20*k, 20:151] == 0).all() for k in range(6))
    page.locator(".noUi-handle").first.focus(); page.keyboard.press("ArrowLeft")
    until(page, lambda: (np.abs(pixels(page, hand.box) - first).sum(-1) > 60).mean() < .01) # nothing of it is seen here


@pytest.mark.slow
def test_zoomed_in_the_brush_covers_what_it_shows(page, served):
    s, hand = opened(page, served)
    page.mouse.move(*hand.at(80, 100)); page.mouse.wheel(0, -400); page.wait_for_timeout(800)
    x0, x1, y0, y1 = page.evaluate("() => { const f = [...Bokeh.index.query(v => v.model.type == 'Figure')][0].model; return [f.x_range.start, f.x_range.end, f.y_range.end, f.y_range.start] }")
    assert (x1 - x0)/.4 < .8*M
    blank = pixels(page, hand.box)
    hand.drag((60, 60), (60, 120), release=False); page.wait_for_timeout(300)
    line = (np.abs(pixels(page, hand.box) - blank).sum(-1) > 40)
    wide = line[:, line.shape[1]//2].sum()*(y1 - y0)/.4/line.shape[0] # rows under the line that is being drawn
    page.mouse.up(); until(page, lambda: len(s.strokes) == 1)
    assert wide == pytest.approx(7, abs=1) and (s.labels[1] == 0).any("x").sum() in (7, 8)
    page.locator(".bk-OnOffButton").first.click() # the arrows: dragging moves the image and paints nothing
    page.mouse.move(*hand.at(80, 100)); page.mouse.down(); page.mouse.move(*hand.at(100, 130), steps=5); page.mouse.up(); page.wait_for_timeout(400)
    assert page.evaluate("() => [...Bokeh.index.query(v => v.model.type == 'Figure')][0].model.x_range.start") < x0 - 1 and len(s.strokes) == 1
    row = (60.5/N*(y1 - y0) + y0)/.4 - .5
    assert (s.labels[1] == 0).any("x").values.nonzero()[0].mean() == pytest.approx(row, abs=.6)


@pytest.mark.slow
def test_of_a_large_slice_each_pixel_is_seen_where_one_zooms_in(page, served):
    page.goto(f"{served[0]}large"); page.locator(".bk-Figure").first.wait_for(timeout=60_000)
    until(page, lambda: len(page.evaluate(FRAMES)) == 1); page.wait_for_timeout(500)
    hand = Hand(page, page.evaluate(FRAMES)[0][1:], (1200, 1600))
    page.mouse.move(*hand.at(300, 400)); page.mouse.wheel(0, -700)
    seen = "() => { const f = [...Bokeh.index.query(v => v.model.type == 'Figure')][0].model; return [f.x_range.start, f.x_range.end, f.renderers[0].data_source.data.dw[0], f.renderers[0].data_source.data.image[0].shape[1]] }"
    def whole(): x0, x1, dw, n = page.evaluate(seen); return n == dw <= x1 - x0 + 2 < 300
    until(page, whole, 1.5 + 3)


@pytest.mark.slow
def test_segment_this_view(page, served):
    s, hand = opened(page, served)
    for k, (name, column) in enumerate((("pore", 40), ("rim", 90), ("NMC", 140))): # stripes of slice 1 begin at column 17
        choose(page, name, k)
        for row in (30, 60, 100, 130): hand.drag((row, column), (row + 10, column))
        until(page, lambda k=k: len(s.strokes) == 4*k + 4)
    plain = pixels(page, hand.box)
    page.get_by_role("button", name="Segment this view").click()
    page.get_by_text("px of strokes on").wait_for(timeout=60_000); page.wait_for_timeout(500)
    after = pixels(page, hand.box)
    truth = np.roll(np.repeat([0, 1, 2, 1], 50), 17)
    assert (s.found_.label == truth).mean() > .97 and s.found_.attrs["slices"] == [1]
    assert (np.abs(after - plain).sum(-1) > 40).mean() > .8 # the phases lie over the whole slice
    page.get_by_role("button", name="Uncertainty").click(); page.wait_for_timeout(500)
    assert (np.abs(pixels(page, hand.box) - after).sum(-1) > 40).mean() > .5


def test_panes_follow_clicks_sliders_and_zoom(page, served):
    page.goto(f"{served[0]}look"); page.locator(".bk-Figure").nth(2).wait_for(timeout=60_000)
    until(page, lambda: len(page.evaluate(FRAMES)) == 3)
    boxes = [b[1:] for b in page.evaluate(FRAMES)]
    main = min(boxes, key=lambda b: b[0] + b[1]); side = max(boxes, key=lambda b: b[0]); below = max(boxes, key=lambda b: b[1])
    shots = lambda: [pixels(page, b) for b in (main, side, below)]
    differ = lambda a, b: [(np.abs(p - q).sum(-1) > 30).mean() for p, q in zip(a, b, strict=True)]
    until(page, lambda: min(p.std() for p in shots()) > 20); page.wait_for_timeout(200)
    before = shots()
    page.mouse.click(main[0] + main[2]*.205, main[1] + main[3]*.71) # column 8 of 40, row 22 of 32
    page.get_by_text("y = 11.25, x = 4.25 µm").wait_for()
    until(page, lambda: min(differ(before, shots())[1:]) > .3)
    after = shots()
    assert differ(before, after)[0] < .05 # in the large pane only the crosshair
    page.locator(".noUi-handle").first.focus()
    for _ in range(3): page.keyboard.press("ArrowLeft")
    page.get_by_text("z = 4.75").wait_for()
    until(page, lambda: differ(after, shots())[0] > .5)
    then = shots()
    assert max(differ(after, then)[1:]) < .05
    page.locator("select").select_option("none")
    until(page, lambda: min(differ(then, shots())) > .3)
    page.mouse.move(main[0] + main[2]/2, main[1] + main[3]/2); page.mouse.wheel(0, -300)
    scales = lambda: page.evaluate("() => [...Bokeh.index.query(v => v.model.type == 'Figure')].map(v => [v.frame.bbox.width/Math.abs(v.model.x_range.end - v.model.x_range.start), v.frame.bbox.height/Math.abs(v.model.y_range.end - v.model.y_range.start)])")
    until(page, lambda: np.mean(scales()) > 1.2*main[2]/20) # larger than before
    page.wait_for_timeout(300)
    assert np.ptp(scales())/np.mean(scales()) < .03 # one scale in all panes
    assert boxes == [b[1:] for b in page.evaluate(FRAMES)] # nothing jumped


@pytest.mark.slow
def test_painting_in_jupyterlab_without_internet(page, tmp_path):
    import nbformat
    code = f"import sys; sys.path.insert(0, {str(ROOT/'tests')!r})\nfrom test_browser_labelling import Scribbler, blobs, view_volume, volume\ns = Scribbler(volume(), ['pore', 'rim', 'NMC'], width=7, size=400, folder={str(tmp_path/'labels')!r})\ns"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (code, "view_volume(*blobs())")], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), tmp_path/"t.ipynb")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    home = tmp_path/"home"
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(home), "JUPYTER_DATA_DIR": str(home/"data"), "JUPYTER_RUNTIME_DIR": str(home/"run"), "JUPYTERLAB_WORKSPACES_DIR": str(home/"ws"), "JUPYTERLAB_SETTINGS_DIR": str(home/"set")}
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--IdentityProvider.token=", "--ServerApp.password=",
                                f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=None"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    try:
        end = time.time() + 90
        while time.time() < end:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0: break
            time.sleep(.3)
        page.set_viewport_size({"width": 1400, "height": 1000})
        page.goto(f"http://127.0.0.1:{port}/lab/tree/t.ipynb"); page.locator(".jp-Notebook").wait_for(timeout=90_000)
        page.get_by_text("| Idle").first.wait_for(timeout=90_000)
        page.get_by_role("menuitem", name="Run").first.click(); page.get_by_text("Run All Cells", exact=True).click()
        page.locator(".bk-Figure").first.wait_for(timeout=120_000)
        until(page, lambda: len(page.evaluate(FRAMES)) == 4, 60); page.wait_for_timeout(1500)
        hand = Hand(page, page.evaluate(FRAMES)[0][1:])
        for name, column in (("pore", 40), ("rim", 90), ("NMC", 140)):
            page.get_by_role("button", name=name, exact=True).click(); page.wait_for_timeout(800)
            hand.drag((30, column), (120, column)); page.wait_for_timeout(800)
        page.get_by_role("button", name="Segment this view").click()
        page.get_by_text("px of strokes on").wait_for(timeout=90_000)
        if os.environ.get("SCREENSHOTS"): page.screenshot(path=f"{os.environ['SCREENSHOTS']}/jupyterlab.png")
        page.get_by_role("button", name="Save", exact=True).click()
        page.get_by_text("Label files written: 1").wait_for(timeout=30_000)
        page.locator(".bk-Figure").nth(1).scroll_into_view_if_needed(); page.wait_for_timeout(1000)
        x, y, w, h = page.evaluate(FRAMES)[1][1:]
        page.mouse.click(x + w*.205, y + h*.71)
        page.get_by_text("y = 11.25, x = 4.25 µm").wait_for(timeout=30_000)
        if os.environ.get("SCREENSHOTS"): page.wait_for_timeout(1000); page.screenshot(path=f"{os.environ['SCREENSHOTS']}/jupyterlab_view.png")
        page.goto("about:blank")
    finally:
        process.terminate(); process.wait(30)
    page.complaints[:] = [c for c in page.complaints if c.startswith("error in a script")] # JupyterLab and Panel ask for style sheets elsewhere, in vain
    found = Scribbler.load(tmp_path/"labels", volume())
    expected = np.full((N, M), 255)
    for code, column in enumerate((40, 90, 140)): expected[brush_mask([(30, column), (120, column)], 7, (N, M))] = code
    assert (found.labels[1] != expected).sum() <= 3*14 # the page may stand between two screen pixels
