"""The exploration view: its parts on data, and the live page in a real browser without internet."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from conftest import ROOT

from batt_nb.core import BattError, flag, label
from batt_nb.explore import Frames, caption, contour, dashboard, explorable, nearest, one, picture, place, shades, thin, view, window_of

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
NASTY = "<img src=x onerror=\"document.title='hacked'\"> 'é' & \"q\".xye"


def series(n=12, points=300, lost=()):
    """A record of 10 h and patterns every 50 min whose peak moves with the voltage."""
    t = np.arange(0, 36001, 60.0)
    echem = label(xr.Dataset({"voltage": ("time", 3.0 + 1.3*np.sin(np.pi*t/36000)**2)}, {"time": t}, {"start_time": "2026-03-18T14:00:00"}))
    start = np.delete(np.arange(n)*3000.0, list(lost))
    x = np.linspace(5.0, 8.0, points)
    volts = np.interp(start + 300, t, echem.voltage)
    peak = 1000*np.exp(-((x - 6.0 - 0.3*(volts[:, None] - 3))/0.05)**2)
    frames = label(xr.Dataset({"intensity": (("time", "two_theta"), peak), "voltage": ("time", volts), "current": ("time", 0*volts + 2e-4), "cycle": ("time", 0*volts + 1)},
        {"time": start, "two_theta": x, "exposure": ("time", 0*start + 600.0), "source": ("time", [NASTY if i == 0 else f"scan_{i}.xye" for i in range(len(start))])},
        {"start_time": "2026-03-18T14:00:00", "technique": "xrd"}))
    return flag(frames, f"the file {NASTY} holds 19 unsorted rows"), echem


def panes(app):
    import panel as pn
    return [p.object for p in app.select(pn.pane.Bokeh)]


def models(app, kind):
    return [m for obj in panes(app) for m in obj.select({"type": kind})]


# ---- parts ------------------------------------------------------------------------------------------------------------------------------

def test_slider_moves_cursor_frame_and_words_together():
    import panel as pn
    from bokeh.models import ColumnDataSource, GlyphRenderer, Span
    frames, echem = series()
    app = view(frames, echem=echem)
    slider = app.select(pn.widgets.DiscreteSlider)[0]
    assert len(slider.options) == 12
    frame = panes(app)[1]
    def drawn(): return next(r.data_source.data["y"] for r in frame.select({"type": GlyphRenderer}) if isinstance(r.data_source, ColumnDataSource) and r.glyph.line_color == "#d62728")
    for i in (5, 2, 11):
        slider.value = i
        assert {s.location for s in models(app, Span)} == {(i*3000 + 300)/3600}
        np.testing.assert_array_equal(drawn(), frames.intensity[i].values)
        assert f"Frame {i + 1} of 12" in "".join(str(p.object) for p in app.select(pn.pane.Str))


def test_a_tap_sets_the_slider():
    import panel as pn
    from bokeh.events import Tap
    from bokeh.plotting import figure
    frames, echem = series()
    app = view(frames, echem=echem)
    slider = app.select(pn.widgets.DiscreteSlider)[0]
    for fig, at, expected in zip(models(app, figure)[:2], (5.0, 2.6), (6, 3), strict=True):
        fig._trigger_event(Tap(fig, x=at, y=1.0))
        assert slider.value == expected == int(np.abs((frames.time.values + 300)/3600 - at).argmin())


def test_only_the_shown_frame_is_loaded():
    import dask.array as da
    loaded = []
    def block(block_info=None):
        loaded.append(block_info[None]["chunk-location"][0])
        return np.zeros((1, 64, 64), "f4")
    image = da.map_blocks(block, chunks=((1,)*40, (64,), (64,)), dtype="f4", meta=np.zeros((0, 0, 0), "f4"))
    f = Frames(xr.Dataset({"image": (("time", "y", "x"), image)}, {"time": np.arange(40.0)}))
    loaded.clear(); one(f, 17)
    assert set(loaded) == {17} and len(loaded) == 1
    loaded.clear(); contour(f, place(f), budget=64*64*4*20)
    assert len(loaded) == 20


def test_gaps_and_unknown_times_stay_empty():
    frames, echem = series(lost=(4, 5))
    f = Frames(frames); p = place(f, echem); c = contour(f, p)
    _, z = shades(c, window_of(c))
    empty = c.x[np.isnan(z).all(0)]
    assert empty.size and 3000*4.5/3600 - 0.05 <= empty.min() and empty.max() < 6*3000/3600
    assert np.isfinite(z[:, (c.x < 3.7) | (c.x > 5.0)]).all()
    unknown = Frames(frames.assign_coords(time=np.where(np.arange(10) == 3, np.nan, frames.time.values)))
    q = place(unknown, echem)
    assert "time unknown" in caption(unknown, q, 3) and nearest(q, p.start[3]) != 3
    app = view(unknown.ds, echem=echem)
    import panel as pn
    from bokeh.models import Span
    app.select(pn.widgets.DiscreteSlider)[0].value = 3
    assert not any(s.visible for s in models(app, Span))


def test_missing_voltage_is_said_and_not_drawn():
    frames, echem = series()
    frames["voltage"] = frames.voltage.where(frames.time > 7000)
    f = Frames(frames); p = place(f, echem)
    assert caption(f, p, 0).endswith("no electrochemistry is joined to this frame") and " V" in caption(f, p, 5)


def test_clocks_that_cannot_be_compared_leave_the_curve_out_and_say_so():
    import panel as pn
    frames, echem = series()
    p = place(Frames(frames.assign_attrs(start_time="2026-03-18T14:00:00+01:00")), echem)
    assert not len(p.time) and "time zone" in p.note and p.label == "Time since the first frame (h)"
    app = view(frames.assign_attrs(start_time="2026-03-18T14:00:00+01:00"), echem=echem)
    assert any("voltage curve is left out" in str(s.object) for s in app.select(pn.pane.Str))


def test_offset_and_drift_move_the_frames():
    frames, echem = series()
    p = place(Frames(frames.assign_attrs(clock_offset=-42.0, clock_drift=1e-3)), echem)
    np.testing.assert_allclose(p.start*3600, frames.time.values*1.001 - 42, atol=1e-6)


def test_maps_volumes_and_frames_without_time():
    maps = Frames(xr.Dataset({"mu": (("frame", "y", "x", "energy"), np.arange(2*3*3*5.0).reshape(2, 3, 3, 5))}, {"energy": np.arange(5.0), "frame": [0, 1]}))
    np.testing.assert_allclose(one(maps, 1), maps.ds.mu[1].mean(("y", "x")))
    assert place(maps).label == "Frame" and contour(maps, place(maps)).lines.shape == (2, 5)
    volume = xr.Dataset({"image": (("time", "z", "y", "x"), np.random.default_rng(0).normal(size=(3, 4, 6, 8)))}, {"time": [0.0, 10.0, 20.0]})
    import panel as pn
    from bokeh.models import GlyphRenderer
    app = view(volume)
    app.select(pn.widgets.IntSlider)[-1].value = 3; app.select(pn.widgets.DiscreteSlider)[0].value = 2
    image = next(r for r in panes(app)[1].select({"type": GlyphRenderer})).data_source.data["image"][0]
    np.testing.assert_allclose(image, volume.image[2, 3], rtol=1e-6)
    with pytest.raises(BattError, match="single frame"): view(volume.isel(time=0, z=0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_frames_full_of_nothing_do_not_break_the_view(bad):
    frames, echem = series()
    frames["intensity"] = frames.intensity.where(frames.time != 6000, bad)
    app = view(frames, echem=echem)
    import panel as pn
    app.select(pn.widgets.DiscreteSlider)[0].value = 2
    lone = frames.assign(intensity=frames.intensity*np.nan)
    with pytest.raises(BattError, match="no finite value"): view(lone, echem=echem)


def test_thinning_a_million_rows_keeps_the_spike():
    v = np.sin(np.arange(1e6)/1e5); v[654_321] = 9.0; v[3] = np.nan
    t, kept = thin(np.arange(1e6), v)
    assert len(t) < 3100 and kept[t == 654_321] == 9.0 and (np.diff(t) > 0).all() and t[0] == 0 and t[-1] == 999_999


def test_picture_is_static_and_takes_names_as_text():
    frames, echem = series()
    frames["source"] = frames.source.copy(data=["$\\frac{$_"] + [f"{i}" for i in range(1, 12)])
    import io
    out = io.BytesIO(); picture(frames, echem, 0).savefig(out, format="png")
    assert out.getbuffer().nbytes > 10_000


def test_dashboard_goes_on_where_one_technique_cannot_be_shown():
    import panel as pn
    frames, echem = series()
    def joined(name):
        if name == "xas": raise BattError("'xas' is not in the store", mend="run campaign.ingest() first")
        return frames
    campaign = SimpleNamespace(name=NASTY, techniques={n: SimpleNamespace(kind=n, cell="A") for n in ("echem", "xas", "xrd")}, joined=joined, echem=lambda cell: echem)
    assert explorable(campaign) == ["xas", "xrd"]
    board = dashboard(campaign)
    assert any("run campaign.ingest() first" in str(s.object) for s in board.select(pn.pane.Str))
    board.select(pn.widgets.Select)[0].value = "xrd"
    assert len(board.select(pn.widgets.DiscreteSlider)) == 1
    with pytest.raises(BattError, match="xas, xrd"): view(campaign, "nmr")


def test_committed_notebooks_carry_no_bokeh():
    for path in (ROOT/"nbs"/"50_explore.ipynb", ROOT/"nbs"/"tutorials"/"01_explore.ipynb"):
        text = path.read_text(encoding="utf-8")
        for cell in json.loads(text)["cells"]:
            for output in cell.get("outputs", []):
                assert not {k for k in output.get("data", {}) if "javascript" in k or "bokeh" in k or "holoviews" in k or "panel" in k}, path.name
        assert "/work/" not in text and "/tmp/" not in text and len(text) < 1e6


# ---- in a browser -----------------------------------------------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="Chromium is not installed (apt install chromium, or set CHROMIUM)")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port, process, seconds=90):
    end = time.time() + seconds
    while time.time() < end:
        if process.poll() is not None: raise RuntimeError(f"the server ended: {process.stderr.read() if process.stderr else ''}")
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0: return
        time.sleep(0.3)
    raise TimeoutError("the server did not start")


@pytest.fixture
def page():
    sync = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.route(lambda u: not u.startswith(("http://127.0.0.1", "data:", "blob:")), lambda r: r.abort())
        yield page
        browser.close()


@pytest.fixture
def served():
    port = free_port()
    code = f"""
import panel as pn, sys
sys.path.insert(0, {str(ROOT/'tests')!r})
from test_explore import series, view
frames, echem = series(lost=(4,))
pn.serve(lambda: view(frames, echem=echem), port={port}, address="127.0.0.1", show=False, websocket_origin="127.0.0.1:{port}")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate(); process.wait(20)


def words(page): return page.locator("pre:has-text('Frame')").first.inner_text()


def until(page, text):
    page.wait_for_function("t => [...document.querySelectorAll('*')].some(e => e.shadowRoot && deep(e.shadowRoot, t)); function deep(r, t) { return [...r.querySelectorAll('pre')].some(p => p.innerText.includes(t)) || [...r.querySelectorAll('*')].some(e => e.shadowRoot && deep(e.shadowRoot, t)) }", arg=text, timeout=20_000)
    page.wait_for_timeout(600)


def shots(page):
    """Pixels of the voltage panel, the contour and the frame."""
    from PIL import Image
    import io
    return [np.asarray(Image.open(io.BytesIO(page.locator(".bk-Figure").nth(i).screenshot())).convert("RGB")).astype(int) for i in range(3)]


def cursor_column(pixels):
    """Where the red cursor stands: the column with most red points."""
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 110) & (pixels[..., 2] < 110)
    assert red.sum(0).max() > 50
    return int(np.median(np.flatnonzero(red.sum(0) > 0.8*red.sum(0).max())))


@needs_chromium
def test_in_chromium_the_slider_moves_the_picture_and_a_tap_moves_the_slider(page, served):
    page.goto(served); page.locator(".bk-Figure").nth(2).wait_for(timeout=60_000)
    until(page, "Frame 1 of 11")
    assert NASTY in " ".join(words(page).split()) and page.title() != "hacked" and page.locator("img[src=x]").count() == 0
    before = shots(page)
    handle = page.locator(".noUi-handle").first; handle.focus()
    for _ in range(5): page.keyboard.press("ArrowRight"); page.wait_for_timeout(150)
    until(page, "Frame 6 of 11")
    after = shots(page)
    for a, b in zip(before, after, strict=True): assert (np.abs(a - b).sum(-1) > 60).sum() > 100
    box = page.locator(".bk-Figure").nth(0).bounding_box()
    hours = (cursor_column(after[0]) - cursor_column(before[0]))
    page.mouse.click(box["x"] + cursor_column(before[0]) + 2*hours, box["y"] + 100)  # twice as far as 6 x 50 min: the last frame, at 11 x 50 min
    until(page, "Frame 11 of 11")
    last = shots(page)
    assert abs(cursor_column(last[0]) - cursor_column(before[0]) - 11/6*hours) <= 4 and abs(cursor_column(last[1]) - cursor_column(last[0])) <= 2
    box = page.locator(".bk-Figure").nth(1).bounding_box()
    page.mouse.click(box["x"] + cursor_column(before[0]), box["y"] + 150)
    until(page, "Frame 1 of 11")
    assert cursor_column(shots(page)[1]) == pytest.approx(cursor_column(before[1]), abs=1)


@needs_chromium
def test_in_jupyterlab_without_internet(page, tmp_path):
    import nbformat
    code = f"import sys; sys.path.insert(0, {str(ROOT/'tests')!r})\nfrom test_explore import series, view\nframes, echem = series()\nview(frames, echem=echem)"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), tmp_path/"t.ipynb")
    port, home = free_port(), tmp_path/"home"
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(home), "JUPYTER_DATA_DIR": str(home/"data"), "JUPYTER_RUNTIME_DIR": str(home/"run"), "JUPYTERLAB_WORKSPACES_DIR": str(home/"ws"), "JUPYTERLAB_SETTINGS_DIR": str(home/"set")}
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--IdentityProvider.token=", "--ServerApp.password=",
                                f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=None"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    try:
        wait_for(port, process)
        page.goto(f"http://127.0.0.1:{port}/lab/tree/t.ipynb"); page.locator(".jp-Notebook").wait_for(timeout=90_000)
        page.get_by_text("| Idle").first.wait_for(timeout=90_000)
        page.get_by_role("menuitem", name="Run").first.click(); page.get_by_text("Run All Cells", exact=True).click()
        page.locator(".bk-Figure").nth(2).wait_for(timeout=120_000)
        until(page, "Frame 1 of 12")
        page.locator(".noUi-handle").first.focus()
        for _ in range(3): page.keyboard.press("ArrowRight"); page.wait_for_timeout(200)
        until(page, "Frame 4 of 12")
        box = page.locator(".bk-Figure").nth(0).bounding_box()
        before = shots(page)
        page.mouse.click(box["x"] + box["width"] - 20, box["y"] + 100)
        until(page, "Frame 12 of 12")
        assert cursor_column(shots(page)[1]) > cursor_column(before[1]) + 100
    finally:
        process.terminate(); process.wait(30)
