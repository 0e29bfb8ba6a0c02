"""Painted labels: the brush against geometry, undo and eraser, files whole or untouched and never lost, labels that the segmenter learns from; the widget's models without a browser."""
import numpy as np
import pytest
import xarray as xr
from scipy import ndimage

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("sklearn")

from batt_nb.cleaning.scribbles import PALETTE, Axis, Scribbler, axis_of, brush_mask, class_colors, contrast_of, count_slice, said_of, shade, table_of, upright, write_whole
from batt_nb.cleaning.segmentation import Segmenter, read_pairs
from batt_nb.core import BattError, history

CODES = {"pore": 10, "solid": 30}
NASTY = "<img src=x onerror=alert(1)>"


def images(shape=(4, 30, 40), step=0.5, dims=("z", "y", "x"), lazy=False, **coords):
    r = np.random.default_rng(0)
    at = {d: (d, (np.arange(n) + .5)*step, {"units": "µm", "long_name": d}) for d, n in zip(dims, shape, strict=True) if d in ("z", "y", "x")} | coords
    da = xr.DataArray(r.normal(size=shape).astype("f4"), at, dims, "image")
    return da.chunk({dims[0]: 1}) if lazy else da


# ---- the brush --------------------------------------------------------------------------------------------------------------------------

def true_mask(points, width, shape):
    """Every pixel against every segment, by the book."""
    y, x = np.indices(shape)
    out = np.zeros(shape, bool)
    for (ay, ax), (by, bx) in zip(points[:-1], points[1:]):
        n = (by - ay)**2 + (bx - ax)**2
        t = np.clip(((y - ay)*(by - ay) + (x - ax)*(bx - ax))/n, 0, 1)
        out |= np.hypot(y - ay - t*(by - ay), x - ax - t*(bx - ax)) <= width/2
    return out


@pytest.mark.parametrize("width", [2, 3, 7.5, 20])
def test_a_stroke_covers_what_lies_within_half_a_width_of_its_line(width):
    r = np.random.default_rng(int(width))
    points = r.uniform(-10, 60, (12, 2)) # some outside
    found, true = brush_mask(points, width, (50, 45)), true_mask(points, width, (50, 45))
    extra = np.argwhere(found & ~true) # the pixels that hold the points, with a thin brush
    assert not (true & ~found).any() and {tuple(p) for p in extra} <= {tuple(np.floor(p + .5).astype(int)) for p in points}


def test_areas_of_disk_and_capsule():
    for r, n in {1: 5, 2: 13, 3: 29, 4: 49, 5: 81, 10: 317, 20: 1257}.items(): assert brush_mask([(50, 50)], 2*r, (101, 101)).sum() == n # Gauss's circle problem (OEIS A000328)
    assert brush_mask([(50.2, 20.7), (80.1, 75.3)], 16, (120, 100)).sum() == pytest.approx(np.pi*64 + 16*np.hypot(29.9, 54.6), rel=.01)


@pytest.mark.parametrize("seed", range(20))
def test_the_thinnest_brush_leaves_one_connected_line(seed):
    points = np.random.default_rng(seed).uniform(2, 58, (5, 2))
    mask = brush_mask(points, 1, (60, 60))
    assert ndimage.label(mask, np.ones((3, 3)))[1] == 1
    assert all(mask[tuple(np.floor(p + .5).astype(int))] for p in points)


def test_far_missing_and_no_points_paint_nothing():
    for points in ([(-1e9, 5)], [(1e12, -1e12), (2e12, -3e12)], [(np.nan, 3)], []): assert not brush_mask(points, 9, (20, 20)).any()
    assert brush_mask([(-1e6, 10), (1e6, 10)], 1, (20, 20)).sum() == 20


# ---- strokes, labels, undo --------------------------------------------------------------------------------------------------------------

def test_labels_are_codes_where_painted_and_the_ignored_code_elsewhere():
    da = images()
    s = Scribbler(da, CODES)
    n = s.paint([(5, 5), (5, 20)], "solid", k=2, width=3)
    labels = s.labels
    mask = brush_mask([(5, 5), (5, 20)], 3, (30, 40))
    assert n == mask.sum() and labels.dims == da.dims and labels.dtype.kind == "u"
    np.testing.assert_array_equal(labels[2], np.where(mask, 30, 255))
    assert (labels.isel(z=[0, 1, 3]) == 255).all() and labels.attrs["codes"] == str(CODES) and labels.attrs["ignore"] == 255
    xr.testing.assert_equal(labels.z, da.z)
    assert history(labels)[-1]["parameters"]["strokes"] == 1


def test_any_order_of_dimensions_one_image_and_chunks():
    turned = images().transpose("x", "z", "y")
    s = Scribbler(turned, CODES)
    s.paint([(3, 30)], "pore", k=1, width=1)
    assert s.labels.dims == ("x", "z", "y") and int(s.labels.sel(x=15.25, z=.75, y=1.75, method="nearest")) == 10 and int((s.labels != 255).sum()) == 1
    one = Scribbler(images()[0].drop_vars("z"), CODES)
    one.paint([(3, 30)], "pore", width=1)
    assert one.labels.shape == (30, 40) and int(one.labels[3, 30]) == 10
    lazy = Scribbler(images(lazy=True), CODES)
    lazy.paint([(3, 30)], "pore", k=1, width=1)
    assert lazy.labels.chunks is not None and lazy.labels.chunksizes["z"] == (1,)*4
    np.testing.assert_array_equal(lazy.labels.compute(), Scribbler(images(), CODES, labels=lazy.labels).labels)


def test_only_the_asked_slice_is_read():
    import dask.array as da
    read = []
    def make(block_info=None):
        read.append(block_info[None]["chunk-location"][0])
        return np.zeros((1, 30, 40), "f4")
    lazy = xr.DataArray(da.map_blocks(make, chunks=((1,)*2000, (30,), (40,)), dtype="f4", meta=np.zeros((0, 0, 0), "f4")), dims=("frame", "y", "x"))
    s = Scribbler(lazy, CODES)
    for k in (7, 1500):
        for name in CODES: s.paint([(10, 10 + 5*CODES[name]/10)], name, k=k)
    s.image(7); assert read == [7]
    assert s.pairs.sizes["frame"] == 2 and sorted(set(read)) == [7, 1500]
    s.labels; assert sorted(set(read)) == [7, 1500] # labels need no image


@pytest.mark.parametrize("seed", range(3))
def test_undo_and_redo_retrace_every_state(seed):
    r = np.random.default_rng(seed)
    first = np.full((4, 30, 40), 255); first[1, 5:9, 5:30] = 10
    s = Scribbler(images(), CODES, labels=xr.DataArray(first, dims=("z", "y", "x")))
    states = [s.labels.values]
    while len(s.strokes) < 25:
        n = s.paint(r.uniform(-5, 45, (4, 2)), r.choice(["pore", "solid", None]), k=int(r.integers(4)), width=float(r.integers(1, 12)))
        if n: states.append(s.labels.values)
        assert n == (states[-1] != states[-2]).sum() if n else True
    for state in states[-2::-1]: assert s.undo() is not None; np.testing.assert_array_equal(s.labels, state)
    assert s.undo() is None and s.strokes == []
    for state in states[1:]: s.redo(); np.testing.assert_array_equal(s.labels, state)
    s.undo(); s.paint([(1, 1)], "solid", k=3, width=2); assert s.redo() is None
    assert [states[0][1, 6, 6], first[1, 6, 6]] == [10, 10] and (first[0] == 255).all() # input untouched


def test_a_stroke_that_changes_nothing_leaves_no_step_to_undo():
    s = Scribbler(images(), CODES)
    assert s.paint([(5, 5)], None, width=9) == 0 and s.paint([(500, 5)], "pore") == 0 and s.strokes == [] and s.labelled == []
    s.paint([(5, 5)], "pore", width=9)
    assert s.paint([(5, 5)], "pore", width=3) == 0 and len(s.strokes) == 1


def test_counts():
    s = Scribbler(images((4, 80, 300)), CODES)
    s.paint([(10, 10), (10, 290)], "pore", k=0, width=1)
    s.paint([(40, 10)], "pore", k=0, width=1); s.paint([(40, 20)], "solid", k=3, width=1)
    c = s.counts
    assert c.pixels.values.tolist() == [282, 1] and c.strokes.values.tolist() == [2, 1] and c.slices.values.tolist() == [1, 1]
    s.paint([(10, 150)], None, k=0, width=21)
    assert s.counts.strokes.values.tolist() == [3, 1] # cut in two
    for _ in range(4): s.undo()
    assert s.counts.pixels.sum() == 0 and s.labelled == []
    assert (count_slice(np.full((9, 9), 255), CODES, 255) == 0).all()


def test_what_is_refused():
    da = images()
    for call, words in ((lambda: Scribbler(da, CODES, ignore=30), "not labelled"), (lambda: Scribbler(da, ["one"]), "two or more"), (lambda: Scribbler(da.rename(y="b"), CODES), "give \\[y, x\\]"),
                        (lambda: Scribbler(da.expand_dims("time"), CODES), "isel"), (lambda: Scribbler(da, CODES, labels=da*0 + 77), "no class"), (lambda: Scribbler(da, CODES, labels=da[1:]), "differ"),
                        (lambda: Scribbler(da, CODES).paint([(1, 1)], "gas"), "pore, solid"), (lambda: Scribbler(da, CODES).paint([(1, 1)], "pore", k=4), "0 to 3"), (lambda: Scribbler(da, CODES).save(), "no folder"),
                        (lambda: Scribbler(da, CODES).pairs, "nothing is labelled"), (lambda: Scribbler(da, CODES).segment(), "pore, solid"), (lambda: Scribbler(da, CODES, colors={"pore": "r"}), "no color for")):
        with pytest.raises(BattError, match=words): call()


# ---- files ------------------------------------------------------------------------------------------------------------------------------

def painted(da=None, **options):
    s = Scribbler(images() if da is None else da, CODES, **options)
    for k in (0, 2): s.paint([(5, 5), (9, 30)], "pore", k=k, width=3); s.paint([(20, 5)], "solid", k=k, width=6)
    return s


def test_saved_labels_come_back(tmp_path):
    s = painted()
    assert [p.name for p in s.save(tmp_path)] == ["0_label.tif", "2_label.tif"] and len(list(tmp_path.iterdir())) == 2
    again = Scribbler.load(tmp_path, images())
    np.testing.assert_array_equal(again.labels, s.labels)
    assert again.classes == CODES and again.labelled == [0, 2] and again.folder == tmp_path and said_of(tmp_path/"0_label.tif") == {"classes": CODES, "ignore": 255}
    again.paint([(15, 15)], "solid", k=1); again.undo(); again.paint([(0, 0)], None, k=2, width=500) # erased altogether
    again.save()
    assert Scribbler.load(tmp_path, images()).labelled == [0]


def test_read_pairs_reads_them_and_segmentpys_names_are_kept(tmp_path):
    r = np.random.default_rng(1)
    grey = r.integers(0, 4000, (3, 30, 40)).astype("u2")
    for n, g in zip((100, 140, 210), grey, strict=True): tifffile.imwrite(tmp_path/f"scan_0{n}.tif", g)
    da = xr.DataArray(grey, {"frame": [100, 140, 210]}, ("frame", "y", "x"))
    s = painted(da)
    assert [p.name for p in s.save(tmp_path, images=True)] == ["scan_0100_label.tif", "scan_0210_label.tif"]
    pairs = read_pairs(tmp_path)
    assert pairs.frame.values.tolist() == [100, 210]
    np.testing.assert_array_equal(pairs.label, s.labels[[0, 2]]); np.testing.assert_array_equal(pairs.image, grey[[0, 2]])
    np.testing.assert_array_equal(tifffile.imread(tmp_path/"scan_0140.tif"), grey[1]) # images that were there are as they were
    resumed = Scribbler.load(tmp_path) # images of the pairs
    np.testing.assert_array_equal(resumed.labels, s.labels[[0, 2]])
    other = tmp_path/"other"
    painted(da).save(other, images=True, name="z")
    assert sorted(p.name for p in other.iterdir()) == ["z100.tif", "z100_label.tif", "z210.tif", "z210_label.tif"]
    np.testing.assert_array_equal(read_pairs(other).image, grey[[0, 2]])


def test_labels_of_others_are_never_overwritten_unasked(tmp_path):
    s = painted()
    tifffile.imwrite(tmp_path/"2_label.tif", np.full((30, 40), 10, "u1"))
    before = (tmp_path/"2_label.tif").read_bytes()
    with pytest.raises(BattError, match="2_label.tif: there already"): s.save(tmp_path)
    assert (tmp_path/"2_label.tif").read_bytes() == before and not (tmp_path/"0_label.tif").exists()
    s.save(tmp_path, overwrite=True); s.save(tmp_path) # now they are its own
    mine, colleague = Scribbler.load(tmp_path, images()), Scribbler.load(tmp_path, images())
    colleague.paint([(1, 1)], "solid", k=0); colleague.save()
    mine.paint([(28, 1)], "pore", k=0)
    with pytest.raises(BattError, match="changed since"): mine.save()


def test_a_save_that_fails_leaves_every_file_as_it_was(tmp_path, monkeypatch):
    s = painted(); s.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    s.paint([(28, 1)], "pore", k=0); s.paint([(28, 1)], "pore", k=2)
    real, calls = tifffile.imwrite, []
    def full(file, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2: file.write(b"II*"); raise OSError(28, "No space left on device")
        return real(file, *args, **kwargs)
    monkeypatch.setattr(tifffile, "imwrite", full)
    with pytest.raises(OSError, match="No space"): s.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo(); s.save(tmp_path)
    np.testing.assert_array_equal(Scribbler.load(tmp_path, images()).labels, s.labels)
    write_whole([])


def test_wrong_files_are_refused_by_name(tmp_path):
    with pytest.raises(BattError, match="no file that ends"): Scribbler.load(tmp_path, images())
    tifffile.imwrite(tmp_path/"9_label.tif", np.zeros((30, 40), "u1"))
    with pytest.raises(BattError, match="do not name the classes"): Scribbler.load(tmp_path, images())
    with pytest.raises(BattError, match="9_label.tif belongs to none"): Scribbler.load(tmp_path, images(), ["a", "b"])
    (tmp_path/"9_label.tif").rename(tmp_path/"1_label.tif")
    with pytest.raises(BattError, match="\\(30, 40\\) on images of \\(30, 50\\)"): Scribbler.load(tmp_path, images((4, 30, 50)), ["a", "b"])
    with pytest.raises(BattError, match="no class"): Scribbler.load(tmp_path, images(), CODES)
    painted().save(tmp_path/"b")
    with pytest.raises(BattError, match="other classes"): Scribbler.load(tmp_path/"b", images(), {"pore": 10, "solid": 31})
    for name in ("a_1.tif", "b_1.tif"): tifffile.imwrite(tmp_path/name, np.zeros((30, 40), "u1"))
    with pytest.raises(BattError, match="several files have the number 1"): painted().save(tmp_path)


@pytest.mark.parametrize("ignore,kind", [(0, "u1"), (255, "u1"), (-1, "i2"), (300, "u2")])
def test_any_ignored_code_survives_the_file(tmp_path, ignore, kind):
    s = painted(ignore=ignore)
    s.save(tmp_path)
    assert tifffile.imread(tmp_path/"0_label.tif").dtype == np.dtype(kind)
    again = Scribbler.load(tmp_path, images())
    assert again.ignore == ignore
    np.testing.assert_array_equal(again.labels, s.labels)


# ---- learning from strokes --------------------------------------------------------------------------------------------------------------

def phantom(seed=3, size=(5, 64, 64), lazy=False):
    r = np.random.default_rng(seed)
    f = ndimage.gaussian_filter(r.normal(size=size), (1, 5, 5)); truth = np.where(f > 0, 30, 10)
    grey = xr.DataArray((np.where(f > 0, 1., 0.) + .3*r.normal(size=size)).astype("f4"), dims=("z", "y", "x"))
    return (grey.chunk({"z": 1}) if lazy else grey), truth


def scribble(s, truth, k, seed, per=5):
    r = np.random.default_rng(seed)
    for name, code in s.classes.items():
        deep = np.argwhere(ndimage.distance_transform_edt(truth[k] == code) > 3)
        for p in deep[r.integers(len(deep), size=per)]: s.paint([p - (0, 1), p + (0, 1)], name, k=k, width=3)


@pytest.mark.parametrize("lazy", [False, True])
def test_paint_see_correct(lazy):
    grey, truth = phantom(lazy=lazy)
    s = Scribbler(grey, CODES)
    scribble(s, truth, 1, 0)
    out = s.segment(3)
    assert set(out.dims) == {"class", "y", "x"} and (out.label == truth[3]).mean() > .93
    a = out.attrs
    assert a["slice"] == 3 and a["slices"] == [1] and 0 < a["seconds"] < 60 and a["pixels"] == int(s.counts.pixels.sum()) and " px of strokes on slice 1. Tested by leaving out 2 of " in a["said"]
    wrong, sure = (out.label != truth[3]).values, out.uncertainty.values
    assert sure[wrong].mean() > 2*sure[~wrong].mean() # it knows where it errs
    grown = s.segmenter_
    part = s.segment(3, window=((10, 30), (0, 41)))
    np.testing.assert_array_equal(part.label[10:30, :41], out.label[10:30, :41]); assert (part.label[30:] == -1).all() and np.isnan(part.probability[:, :, 41:]).all()
    assert s.segmenter_ is grown # no new strokes, no new forest
    scribble(s, truth, 4, 1)
    assert "slices 1, 4" in s.segment(3).attrs["said"] and len(s.segmenter_.learned_[1]) == s.counts.pixels.sum() # it learns from all, and is tested on what another left out
    assert .8 < s.segmenter_.report_.attrs["accuracy"] <= 1 and "Tested" not in s.segment(3, Segmenter(CODES, network="forest", context=0, held=0, trees=5, progress=False)).attrs["said"]
    with pytest.raises(BattError, match="context=0"): s.segment(3, Segmenter(CODES, network="forest"))


def test_labels_are_what_the_segmenter_takes():
    grey, truth = phantom()
    s = Scribbler(grey, CODES)
    for k in (1, 3): scribble(s, truth, k, k)
    found = Segmenter(CODES, network="forest", trees=20, progress=False).fit(grey, s.labels, ignore=s.ignore).predict(grey)
    assert (found.label == truth).mean() > .88


# ---- the widget's parts, without a browser ----------------------------------------------------------------------------------------------

def test_axes_colors_contrast():
    da = images().assign_coords(x=("x", np.arange(40)[::-1]*.25, {"units": "mm", "long_name": "width"}))
    assert axis_of(da, "y") == Axis(.25, .5, 30, "y (µm)") and axis_of(da, "x") == Axis(9.75, -.25, 40, "width (mm)") and axis_of(da.drop_vars("y"), "y").label == "y (px)"
    assert axis_of(da.assign_coords(x=np.arange(40.)**2), "x").step == 1 and axis_of(da, "x").edges == (9.875, -.125)
    assert [axis_of(da, "x").index(a) for a in (9.75, 9.5, -5, 99)] == [0, 1, 39, 0]
    colors = class_colors([f"c{k}" for k in range(20)])
    assert len(set(colors.values())) == 20 and list(colors.values())[:7] == [c.lower() for c in PALETTE]
    assert contrast_of(np.full((3, 3), np.nan)) == (0, 0, 1, 1) and contrast_of(np.full((3, 3), 7.)) == (6.5, 6.5, 7.5, 7.5)
    assert shade(np.array([[0, 5, 10, np.nan]]), (0, 10)).tolist() == [[0, 127, 255, 0]]
    up = upright(np.array([[1, 2], [3, 4]]), Axis(10, -1, 2, "y"), Axis(0, 2, 2, "x"))
    assert up["image"][0].tolist() == [[3, 4], [1, 2]] and (up["x"], up["y"], up["dw"], up["dh"]) == ([-1], [8.5], [4], [2])


def parts(app):
    import panel as pn
    fig = app.select(pn.pane.Bokeh)[0].object
    by = {w.label or w.name: w for w in app.select(pn.widgets.Widget)}
    sources = [r.data_source for r in fig.renderers]
    return by, {"grey": sources[0], "found": sources[1], "marks": sources[3], "live": sources[4]}, fig


def test_widget_paints_undoes_and_follows_the_slider():
    da = images().assign_coords(y=("y", np.arange(30)[::-1]*.5, {"units": "µm"})) # rows fall
    s = Scribbler(da, {"pore": 10, NASTY: 30})
    import panel as pn
    app = pn.panel(s) # as `panel serve` and layouts take it
    w, source, fig = parts(app)
    w["Slice"].value = 1
    w["Paint"].value = NASTY
    brush = next(r.glyph for r in fig.renderers if type(r.glyph).__name__ == "MultiLine")
    assert brush.tags == [1, 30, 5] and NASTY not in table_of(s) and "&lt;img" in table_of(s)
    xs, ys = [float(da.x[3]), float(da.x[20])], [float(da.y[4]), float(da.y[4])]
    source["live"].data = {"xs": [xs], "ys": [ys], "brush": [[1, *brush.tags]]}
    expected = np.where(brush_mask([(4, 3), (4, 20)], 5, (30, 40)), 30, 255)
    np.testing.assert_array_equal(s.labels[1], expected)
    np.testing.assert_array_equal(source["marks"].data["image"][0][::-1], np.where(expected == 30, 2, 0)) # drawn from the smallest y
    source["live"].data = {"xs": [xs, xs], "ys": [ys, [y - 4 for y in ys]], "brush": [[1, *brush.tags], [2, 2, 10, 1]]} # the first was put down already; the second was drawn on slice 2
    assert len(s.strokes) == 2 and s.labelled == [1, 2] and int((s.labels[2] == 10).sum()) == 18
    w["Undo"].clicks += 1
    assert s.labelled == [1] and w["Slice"].value == 2
    w["Redo"].clicks += 1; assert s.labelled == [1, 2]
    w["Paint"].value = "Erase"; assert brush.tags == [2, 255, 5]
    s.paint([(15, 15)], "pore", k=2, width=9); assert source["marks"].data["image"][0][::-1][15, 15] == 1 # painted by a program: the view follows
    before = source["grey"].data["image"][0]
    w["Slice"].value = 0; assert (source["grey"].data["image"][0] != before).any() and not source["marks"].data["image"][0].any()


def test_of_a_large_slice_the_screen_gets_what_it_can_show_and_all_where_one_zooms_in():
    da = xr.DataArray(np.add.outer(np.arange(2048.), np.zeros(1600)).astype("f4"), dims=("y", "x"))
    s = Scribbler(da, CODES)
    s.paint([(1000, 100), (1000, 1500)], "solid", width=1)
    w, source, fig = parts(s.panel())
    shown = source["grey"].data
    assert shown["image"][0].shape == (682, 533) and (shown["y"], shown["dh"]) == ([-.5], [2046.]) and (source["marks"].data["image"][0] == 2).any(1).nonzero()[0].tolist() == [333] # it is there though thin
    fig.y_range.update(start=1100, end=900); fig.x_range.update(start=0, end=500)
    fig.tags = [0, 500, 1100, 900] # the browser says so when it is still
    shown = source["marks"].data
    assert shown["image"][0].shape == (201, 501) and shown["y"] == [899.5] and (shown["image"][0] == 2).any(1).nonzero()[0].tolist() == [100] and int((s.labels == 30).sum()) == 1401


def test_widget_says_what_it_cannot_do_and_saves(tmp_path):
    import panel as pn
    s = Scribbler(images(), CODES, folder=tmp_path/"new")
    app = s.panel(); w, *_ = parts(app)
    said = lambda: app.select(pn.pane.HTML)[-1].object
    w["Segment this view"].clicks += 1; assert "no stroke of pore, solid yet" in said() and not w["Segment this view"].disabled
    w["Save"].clicks += 1; assert "nothing is labelled" in said()
    s.paint([(5, 5)], "pore"); assert w["Save"].color == "warning"
    w["Save"].clicks += 1; assert w["Save"].color == "default"
    assert "Label files written: 1" in said() and (tmp_path/"new"/"0_label.tif").exists()


def test_importing_is_cheap():
    import subprocess, sys
    code = "import sys, batt_nb.cleaning.scribbles, batt_nb.cleaning.volume_views; print(sorted({'panel', 'bokeh', 'holoviews', 'matplotlib', 'torch', 'sklearn', 'tifffile'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
