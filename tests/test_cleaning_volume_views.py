"""Volume views: the right slice in each pane with its true place and scale, nothing read that is not shown, fractions against counts, the figure, the live panes without a browser."""
import io

import numpy as np
import pytest
import xarray as xr

from batt_nb.cleaning.scribbles import Axis, thinned, window_of
from batt_nb.cleaning.volume_views import PANES, Volume, class_fractions, class_index, classes_of, cut, draw_volume, legend_of, view_volume, words_of
from batt_nb.core import BattError, history

NASTY = "<img src=x onerror=alert(1)>"
CLASSES = {"pore": 10, NASTY: 30}


def case(size=(5, 8, 12), step=(1.0, .5, .25)):
    """Every voxel has its own grey value; labels, probability, uncertainty as `predict` gives them."""
    at = {d: (d, (np.arange(n) + .5)*s, {"units": "µm", "long_name": d}) for d, n, s in zip("zyx", size, step, strict=True)}
    grey = xr.DataArray(np.arange(np.prod(size), dtype="f4").reshape(size), at, ("z", "y", "x"))
    p = np.random.default_rng(0).uniform(.05, .95, size).astype("f4")
    found = xr.Dataset({"label": (grey.dims, np.where(p > .5, 10, 30).astype("i2"), {"codes": str(CLASSES)}), "probability": (("class", *grey.dims), np.stack([p, 1 - p])),
                        "uncertainty": (grey.dims, -(p*np.log(p) + (1 - p)*np.log(1 - p))/np.log(2))}, {"class": list(CLASSES), **grey.coords})
    return grey, found


def counted(grey, chunks, read):
    """The volume in Dask chunks that note that they were read."""
    import dask.array as da
    def note(block, block_location=None):
        read.append(block_location)
        return block
    lazy = da.from_array(grey.values, chunks=chunks)
    lazy = da.map_blocks(lambda b, block_info=None: note(b, tuple(block_info[0]["chunk-location"])), lazy, dtype=grey.dtype, meta=np.zeros((0, 0, 0), grey.dtype))
    return grey.copy(data=lazy)


# ---- slices -----------------------------------------------------------------------------------------------------------------------------

def test_a_pane_holds_the_voxels_of_its_slice():
    grey, found = case()
    v = Volume(grey.transpose("x", "z", "y"), found)
    for dim, (rows, columns) in PANES.items():
        k = v.axes[dim].size - 2
        for i in (0, v.axes[rows].size - 1):
            for j in (0, 3): assert cut(v, "grey", dim, k)[i, j] == grey.isel({dim: k, rows: i, columns: j})
    np.testing.assert_array_equal(cut(v, f"probability of {NASTY}", "x", 4), found.probability[1, :, :, 4].T)
    assert v.overlays == ["none", "phases", "uncertainty", "probability of pore", f"probability of {NASTY}"] and v.classes == CLASSES


def test_only_what_is_shown_is_read():
    grey, found = case((64, 16, 16))
    read = []
    v = Volume(counted(grey, (1, 16, 16), read), counted(found.label, (1, 16, 16), labels := []), classes=CLASSES)
    assert read == [] and labels == []
    np.testing.assert_array_equal(cut(v, "grey", "z", 40), grey[40])
    assert read == [(40, 0, 0)] and labels == []


def test_of_cubic_chunks_a_slice_reads_one_layer_along_any_axis():
    grey, _ = case((24, 24, 24)); read = []
    v = Volume(counted(grey, (8, 8, 8), read))
    for dim in "zyx":
        read.clear(); cut(v, "grey", dim, 9)
        assert len(read) == 9 and {loc["zyx".index(dim)] for loc in read} == {1}


def test_a_file_on_disk_is_read_slice_by_slice(tmp_path):
    grey, _ = case((30, 40, 50))
    grey.to_dataset(name="image").to_netcdf(tmp_path/"v.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path/"v.nc", engine="h5netcdf", cache=False) as ds:
        v = Volume(ds.image)
        for dim in "zyx": np.testing.assert_array_equal(cut(v, "grey", dim, 7), grey.isel({dim: 7}).transpose(*PANES[dim]))
        assert not ds.image.variable._in_memory


def test_the_view_reads_a_pane_again_only_when_its_slice_changes():
    import panel as pn
    grey, found = case((24, 24, 24)); read = []
    app = view_volume(counted(grey, (1, 24, 24), read), found)
    z, y, _ = (next(w for w in app.select(pn.widgets.DiscreteSlider) if w.label == d) for d in "zyx")
    read.clear(); z.value = 20
    assert read == [(20, 0, 0)] # the side panes stay
    read.clear(); y.value = 3
    assert len(read) == 24 # one of them, once
    read.clear(); next(w for w in app.select(pn.widgets.Select) if w.label == "Overlay").value = "uncertainty"
    assert read == []


def test_where_the_classes_come_from():
    grey, found = case()
    bare = found.label.copy(); bare.attrs = {}
    bare[2, 0, 0] = -1
    assert classes_of(bare, None, None) == {"10": 10, "30": 30} and classes_of(bare, None, ["a", "b"]) == {"a": 0, "b": 1}
    assert classes_of(None, found.probability, None) == {"pore": 0, NASTY: 1} and classes_of(None, found.probability.drop_vars("class"), None) == {"0": 0, "1": 1}
    assert class_index(np.array([10, 30, 255, -1]), CLASSES).tolist() == [1, 2, 0, 0]
    for call, words in ((lambda: Volume(grey, found.label[1:]), "differ"), (lambda: Volume(grey[0]), "\\[z, y, x\\]"), (lambda: view_volume(grey, overlay="phases"), "one of none"), (lambda: draw_volume(grey, found, overlay="age"), "probability of pore")):
        with pytest.raises(BattError, match=words): call()


# ---- fractions --------------------------------------------------------------------------------------------------------------------------

def test_fractions_count_labelled_voxels():
    grey, found = case((7, 10, 10))
    label = found.label.copy(deep=True); label[3] = 255; label[4, :5] = -1; label[4, 5:] = 30
    share = class_fractions(label, CLASSES)
    assert history(share)[-1]["function"] == "cleaning.volume_views.class_fractions"
    assert share.dims == ("class", "z") and np.isnan(share[:, 3]).all() and share[:, 4].values.tolist() == [0, 1]
    np.testing.assert_allclose(share.sel({"class": "pore"})[:3], (label[:3] == 10).mean(("y", "x")))
    np.testing.assert_array_equal(class_fractions(label.chunk(z=3, y=4), CLASSES), share)
    np.testing.assert_allclose(class_fractions(label, CLASSES, dim="x").sum("class"), 1)


# ---- no more pixels than the screen has -------------------------------------------------------------------------------------------------

def test_thinning_keeps_places_means_and_codes():
    rows, columns = Axis(.5, 1., 1000, "y"), Axis(-3., -.5, 777, "x")
    values = np.add.outer(np.arange(1000.), 10*np.arange(777.))
    for window in (((0, 1000), (0, 777)), ((301, 999), (5, 770))):
        small, r, c = thinned(values, rows, columns, window, most=200)
        assert max(small.shape) <= 200 and (r.size, c.size) == small.shape
        at = lambda a, whole: (a.start + a.step*np.arange(a.size) - whole.start)/whole.step # positions in the whole slice
        np.testing.assert_allclose(small, np.add.outer(at(r, rows), 10*at(c, columns))) # the mean of a ramp is its middle
    part, r, _ = thinned(values, rows, columns, ((10, 20), (30, 45)))
    np.testing.assert_array_equal(part, values[10:20, 30:45]); assert r.start == 10.5
    codes = np.where(values % 3 > 1, 10, 30)
    assert set(np.unique(thinned(codes, rows, columns, ((0, 1000), (0, 777)), 100, "pick")[0])) <= {10, 30}
    thin = np.zeros((1000, 777), "u1"); thin[:, 333] = 2 # a stroke one pixel wide is seen
    small, _, c = thinned(thin, rows, columns, ((0, 1000), (0, 777)), 200, "most")
    assert (small.max(0) == 2).sum() == 1 and (small[:, c.index(columns.start + 333*columns.step)] == 2).all()
    assert window_of(rows, -50, 3.2) == (0, 4) and window_of(columns, -5, -4) == (2, 5)


# ---- the figure -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("overlay", ["none", "phases", "uncertainty", "probability of pore"])
def test_figure_has_true_places_at_one_scale(overlay):
    import matplotlib.pyplot as plt
    grey, found = case()
    fig = draw_volume(grey, found, overlay=overlay, at={"z": 1, "y": 6, "x": 11})
    fig.savefig(io.BytesIO(), format="png")
    panes = fig.axes[:3]
    for ax, dim in zip(panes, ("z", "x", "y"), strict=True):
        rows, columns = PANES[dim]
        assert ax.get_xlabel() == f"{columns} (µm)" and ax.get_ylabel() == f"{rows} (µm)" and ax.get_aspect() == 1
        np.testing.assert_array_equal(ax.images[0].get_array(), grey.isel({dim: {"z": 1, "y": 6, "x": 11}[dim]}).transpose(rows, columns))
        n, s = grey.sizes[columns], float(grey[columns][1] - grey[columns][0])
        assert ax.get_xlim() == pytest.approx((0, n*s)) and ax.get_ylim()[0] > ax.get_ylim()[1] == pytest.approx(0)
    assert panes[0].get_title() == "z = 1.5 µm" and panes[1].get_title() == "x = 2.875 µm"
    assert len({round(ax.get_position().width*fig.get_figwidth()/abs(np.subtract(*ax.get_xlim())), 2) for ax in panes}) == 1 # inches a µm
    line = next(ax for ax in fig.axes if ax.get_ylabel().startswith("Fraction")).lines[0]
    np.testing.assert_allclose(line.get_ydata(), (found.label == 10).mean(("y", "x")))
    plt.close(fig)


def test_figure_of_grey_values_alone_and_in_pixels():
    import matplotlib.pyplot as plt
    grey, _ = case()
    fig = draw_volume(grey.drop_vars(["z", "y", "x"]))
    assert len(fig.axes) == 3 and fig.axes[0].get_xlabel() == "x (px)" and fig.axes[0].get_title() == "z = 2 px"
    plt.close(fig)


# ---- the live view, without a browser ---------------------------------------------------------------------------------------------------

def panes_of(app):
    import panel as pn
    figs = {(f.yaxis[0].axis_label[0], f.xaxis[0].axis_label[0]): f for f in (p.object for p in app.select(pn.pane.Bokeh))}
    return {d: figs[PANES[d]] for d in PANES}, {w.label: w for w in app.select(pn.widgets.Widget)}


def test_a_click_moves_the_other_panes_and_every_crosshair():
    from bokeh.events import Tap
    from bokeh.models import Span
    grey, found = case((20, 24, 28), (1.0, .5, .5))
    figs, w = panes_of(view_volume(grey, found, limits=(0, float(grey.max())), overlay="none"))
    figs["z"]._trigger_event(Tap(figs["z"], x=float(grey.x[21]) + .2, y=float(grey.y[3]) - .2))
    assert (w["z"].value, w["y"].value, w["x"].value) == (10, 3, 21)
    figs["y"]._trigger_event(Tap(figs["y"], x=float(grey.x[9]), y=float(grey.z[17])))
    at = {"z": 17, "y": 3, "x": 9}
    assert {d: w[d].value for d in "zyx"} == at
    for dim, fig in figs.items():
        rows, columns = PANES[dim]
        expected = 255*grey.isel({dim: at[dim]}).transpose(rows, columns).values/float(grey.max())
        np.testing.assert_allclose(fig.renderers[0].data_source.data["image"][0], expected, atol=1)
        assert {s.dimension: s.location for s in fig.center if isinstance(s, Span)} == {"width": float(grey[rows][at[rows]]), "height": float(grey[columns][at[columns]])}
        assert fig.frame_width/abs(fig.x_range.end - fig.x_range.start) == pytest.approx(fig.frame_height/abs(fig.y_range.end - fig.y_range.start), rel=.02) # equal scales


def test_overlays_are_those_chosen():
    grey, found = case((20, 24, 28), (1., .5, .5))
    figs, w = panes_of(view_volume(grey, found))
    fig = figs["x"]
    seen = lambda: [r.visible for r in fig.renderers[1:4]]
    np.testing.assert_array_equal(fig.renderers[1].data_source.data["image"][0], np.where(found.label[:, :, 14].T == 10, 1, 2)); assert seen() == [True, False, False]
    w["Overlay"].value = "uncertainty"
    np.testing.assert_allclose(fig.renderers[2].data_source.data["image"][0], 255*found.uncertainty[:, :, 14].T, atol=1); assert seen() == [False, True, False]
    w["Overlay"].value = f"probability of {NASTY}"
    np.testing.assert_allclose(fig.renderers[3].data_source.data["image"][0], 255*found.probability[1, :, :, 14].T, atol=1); assert seen() == [False, False, True]
    w["Overlay"].value = "none"; assert seen() == [False]*3


def test_words_and_legend_are_text():
    grey, found = case()
    v = Volume(grey, found)
    at = {"z": 1, "y": 2, "x": 3}
    read = {"at": 1, "grey": grey[1].values, "label": np.full((8, 12), 30), f"probability of {NASTY}": found.probability[1, 1].values}
    words = words_of(v, at, read)
    assert "z = 1.5, y = 1.25, x = 0.875 µm" in words and f"{float(grey[1, 2, 3]):.4g}" in words and "<img" not in words + legend_of(v, "phases") and "&lt;img" in words
    assert "no idea" in legend_of(v, "uncertainty") and legend_of(v, "none") == ""
