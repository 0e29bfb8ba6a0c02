"""Segmentation from strokes: tiles equal the whole, strokes are left out whole, probabilities are calibrated, files come back; classifier; SegmentPy's folders."""
import numpy as np
import pytest
import xarray as xr
from scipy import ndimage

torch = pytest.importorskip("torch")
tifffile = pytest.importorskip("tifffile")
pytest.importorskip("sklearn")

from batt_nb.cleaning.classification import Classifier
from batt_nb.cleaning.networks import make_network, reach
from batt_nb.cleaning.segmentation import (FILTER_REACH, Segmenter, ask, encode, filter_bank, find_prior, find_strokes, find_temperature, hold_out, read_pairs,
                                           reliability, tiled, warm, with_prior, write_slices)
from batt_nb.core import BattError, history
from batt_nb.learn import seeded
from conftest import DATA, needs_data

CODES = {"pore": 10, "solid": 30, "binder": 20}


pytestmark = pytest.mark.usefixtures("one_thread")


def phantom(seed, size=(8, 48, 48), noise=.12):
    "Balls with a rim, as codes 10, 30, 20 and a noisy image."
    r = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    far = np.min([np.linalg.norm(at - r.uniform(0, size), axis=-1) - r.uniform(6, 11) for _ in range(6)], 0)
    truth = np.where(far < 0, 30, np.where(far < 3, 20, 10)).astype("u1")
    grey = ndimage.gaussian_filter(np.select([truth == 30, truth == 20], [1., .4]), .6) + noise*r.normal(size=size)
    coords = {d: (d, np.arange(n)*.5, {"units": "µm"}) for d, n in zip("zyx", size)}
    return xr.DataArray(grey.astype("f4"), coords, ("z", "y", "x"), "image"), xr.DataArray(truth, coords, ("z", "y", "x"))


def paint(truth, slices, seed, per=6):
    r, out = np.random.default_rng(seed), np.full(truth.shape, 255, "u1")
    for z in slices:
        for c in CODES.values():
            at = np.argwhere(truth.values[z] == c)
            for y, x in at[r.integers(len(at), size=per)]:
                here = (z, slice(max(y - 1, 0), y + 2), slice(max(x - 1, 0), x + 2))
                out[here] = np.where(truth.values[here] == c, c, out[here])
    return truth.copy(data=out)


def iou(found, truth): return np.mean([((found == c) & (truth == c)).sum()/((found == c) | (truth == c)).sum() for c in CODES.values()])


@pytest.fixture(scope="module")
def case():
    grey, truth = phantom(0)
    return grey, truth, paint(truth, (1, 4, 6), 0)


@pytest.fixture(scope="module")
def forest(case): return Segmenter(CODES, network="forest", trees=40, progress=False).fit(case[0], case[2], ignore=255)


@pytest.fixture(scope="module")
def taught(case): return Segmenter(CODES, trees=40, epochs=5, steps=5, width=4, crop=32, depth=2, progress=False).fit(case[0], case[2], ignore=255)


def test_lrcs_has_the_published_number_of_weights():
    assert sum(p.numel() for p in make_network("lrcs", 3, width=16).parameters()) == 188_595 # Su et al. 2022: 189 thousand


@pytest.mark.parametrize("name, dims", [("unet", 2), ("lrcs", 2), ("segnet", 2), ("unet", 3)])
def test_tiles_equal_the_whole(name, dims):
    with seeded(1, "weights"): net = make_network(name, 3, 1 if dims == 3 else 3, dims=dims, width=3, depth=3 if name == "lrcs" else 4 - dims)
    for m in net.modules(): # statistics of a trained network
        if hasattr(m, "running_mean"): m.running_mean += 0.1*torch.randn_like(m.running_mean); m.running_var *= 1.3
    net.eval()
    v = np.random.default_rng(0).normal(size=(3, 101, 118) if dims == 2 else (22, 30, 27)).astype("f4")
    r, unit = reach(net), 2**net.depth
    margin, units = ((1, r, r), (1, unit, unit)) if dims == 2 else ((r,)*3, (unit,)*3)
    f = lambda b: ask(net, b, 1 if dims == 2 else 0, 4 if dims == 2 and name == "unet" else 1)
    whole = tiled(f, v, (999,)*3, margin, units)
    parts = tiled(f, v, (2, 24, 40) if dims == 2 else (6, 12, 10), margin, units)
    assert whole.shape == (3, *v.shape) and np.abs(whole - parts).max() < 1e-5 and whole.std() > 1e-4
    assert np.allclose(whole.sum(0), 1, atol=1e-5)


def test_filters_are_local():
    v = np.random.default_rng(0).normal(size=(46, 50, 48)).astype("f4")
    a = filter_bank(v)
    v2 = v.copy(); v2[:2] += 5
    assert np.abs(filter_bank(v2)[2 + FILTER_REACH:] - a[2 + FILTER_REACH:]).max() < 1e-5 and a.shape[-1] == 26
    b = filter_bank(v[:1])
    assert b.shape == (1, 50, 48, 21)
    ramp = np.add.outer(np.zeros(40), np.arange(40.))[None].astype("f4")
    assert np.allclose(filter_bank(ramp)[0, 20, 20, 2], 1, atol=1e-3) # the gradient of a ramp


def test_forest_and_taught_network_find_the_phases(case, forest, taught):
    grey, truth, _ = case
    before = grey.copy(deep=True)
    for m, least in ((forest, .85), (taught, .85)):
        found = m.predict(grey)
        assert iou(found.label.values, truth.values) > least
        assert set(np.unique(found.label)) <= set(CODES.values()) and np.allclose(found.probability.sum("class"), 1, atol=1e-5)
        assert float(found.uncertainty.min()) >= 0 and float(found.uncertainty.max()) <= 1
        wrong = found.label.values != truth.values
        assert found.uncertainty.values[wrong].mean() > 3*found.uncertainty.values[~wrong].mean()
        assert history(found)[-1]["function"] == "cleaning.segmentation.Segmenter.predict"
    xr.testing.assert_identical(grey, before)
    new, truth = phantom(1)
    found = taught.predict(new)
    assert iou(found.label.values, truth.values) > .8
    assert reliability(np.moveaxis(found.probability.values, 0, -1), encode(truth.values, CODES)).attrs["ece"] < .05


def test_tile_and_chunks_do_not_matter(case, taught):
    grey = case[0]
    whole = taught.predict(grey)
    lazy = taught.predict(grey.chunk(z=3))
    assert all(lazy[k].chunks is not None for k in lazy.data_vars)
    assert np.abs(lazy.probability.values - whole.probability.values).max() < 1e-5 and (lazy.label.values == whole.label.values).mean() > .9999
    old, taught.settings["tile"] = taught.settings["tile"], 16
    assert np.abs(taught.predict(grey).probability.values - whole.probability.values).max() < 1e-5
    taught.settings["tile"] = old
    series = xr.concat([grey, grey[::-1].assign_coords(z=grey.z)], "time").assign_coords(time=[0., 60.])
    both = taught.predict(series.chunk(time=1))
    assert both.label.dims == series.dims and np.abs(both.probability.isel(time=0).values - whole.probability.values).max() < 1e-5


def test_same_seed_same_result_and_files(case, taught, forest, tmp_path):
    grey, _, marks = case
    for m in (taught, forest):
        again = Segmenter.load(m.save(tmp_path/"s.safetensors"))
        xr.testing.assert_identical(again.predict(grey[:4]), m.predict(grey[:4]))
        assert again.temperature_ == m.temperature_ and again.report_.attrs["ece"] == m.report_.attrs["ece"]
    options = dict(teacher=None, epochs=2, steps=2, width=4, crop=16, depth=1, progress=False, context=1)
    one, two = (Segmenter(CODES, **options).fit(grey, marks, ignore=255) for _ in range(2))
    assert np.array_equal(one.predict(grey).probability, two.predict(grey).probability)
    on = Segmenter(CODES, **options).fit(grey, marks, ignore=255, start=one) # transfer
    assert float(on.history_.train_loss[0]) < float(one.history_.train_loss[0])
    with pytest.raises(BattError, match="not learned"): Segmenter(CODES).save(tmp_path/"t")


def test_live_curves_are_drawn_and_not_saved(case, tmp_path, monkeypatch):
    import IPython.display
    drawn = []
    class Screen:
        def update(self, figure): drawn.append(len(figure.axes[0].lines[0].get_xdata()))
    def display(figure, display_id=None):
        drawn.append(len(figure.axes[0].lines[0].get_xdata()))
        return Screen()
    monkeypatch.setattr(IPython.display, "display", display)
    grey, _, marks = case
    options = dict(teacher=None, epochs=3, steps=1, width=2, crop=16, depth=1, context=0, turns=1, progress=False)
    live = Segmenter(CODES, **options, plot=True).fit(grey, marks, ignore=255)
    assert drawn == [1, 2, 3] # points of the curve: one display, updated in place
    quiet = Segmenter(CODES, **options).fit(grey, marks, ignore=255)
    assert drawn == [1, 2, 3] and "plot" not in live.settings and not quiet.plot
    assert live.save(tmp_path/"a.safetensors").read_bytes() == quiet.save(tmp_path/"b.safetensors").read_bytes()
    xr.testing.assert_identical(live.predict(grey[:2]), quiet.predict(grey[:2])) # the history too
    curves = xr.DataArray(np.random.default_rng(0).normal(size=(20, 32)), dims=("frame", "x"))
    one, two = (Classifier(["a", "b"], width=2, depth=1, epochs=2, progress=False, plot=plot).fit(curves, ["a", "b"]*10) for plot in (True, False))
    assert drawn == [1, 2, 3, 1, 2] and one.config == two.config
    assert one.save(tmp_path/"c.safetensors").read_bytes() == two.save(tmp_path/"d.safetensors").read_bytes()


@pytest.mark.parametrize("options", [dict(network="segnet", dims=2), dict(network="xlearn", crop=32), dict(network="lrcs", context=0), dict(network="unet", dims=3, depth=1)], ids=lambda o: o["network"] + str(o.get("dims", 2)))
def test_every_network_trains_and_predicts(case, options):
    grey, _, marks = case
    m = Segmenter(CODES, **{"trees": 5, "epochs": 1, "steps": 2, "width": 2, "crop": 16, "batch": 2, "turns": 1, "depth": 2, "progress": False} | options).fit(grey, marks, ignore=255)
    p = m.predict(grey).probability
    assert p.shape == (3, *grey.shape) and np.allclose(p.sum("class"), 1, atol=1e-4)


def test_strokes_are_left_out_whole(case, forest):
    marks = encode(case[2].values, CODES, 255)[None]
    ids, kinds = find_strokes(marks)
    left = hold_out(kinds, .2, 0)
    assert all(0 < left[kinds == c].sum() < (kinds == c).sum() for c in range(3))
    inside = np.isin(ids, np.flatnonzero(~left))
    assert len(forest.learned_[1]) == inside.sum() and forest.report_.attrs["pixels"] == (ids >= 0).sum() - inside.sum()
    dots = np.full((1, 1, 40, 40), -1, np.int8); dots[0, 0, 5, 5:30:6] = 0; dots[0, 0, 30, 30] = 0
    assert len(find_strokes(dots)[1]) == 6 and len(find_strokes(dots, gap=7)[1]) == 2
    full = np.zeros((1, 1, 128, 128), np.int8)
    assert len(find_strokes(full)[1]) == 4 # a slice that is labelled whole is cut


def test_probabilities():
    r = np.random.default_rng(0)
    p = r.dirichlet([.4]*4, 5000)
    y = (p.cumsum(1) < r.random((5000, 1))).sum(1)
    assert find_temperature(warm(p, 2.), y) == pytest.approx(.5, abs=.06) and reliability(p, y).attrs["ece"] < .02
    share = np.array([.6, .3, .1])
    x = r.normal(np.array([0, 3, 6.])[kind := r.choice(3, 8000, p=share)], 1)
    like = np.exp(-(x - np.array([0, 3, 6.])[:, None])**2/2)
    equal = like/like.sum(0)
    assert np.abs(find_prior(equal) - np.bincount(kind)/8000).max() < .012 < .02 < np.abs(equal.mean(1) - share).max()
    assert reliability(with_prior(equal, share).T, kind).attrs["ece"] < .01


def test_missing_values_have_no_phase(case, forest):
    grey = case[0].copy(); grey[2, 10:14, 10:14] = np.nan
    found = forest.predict(grey)
    assert (found.label[2, 10:14, 10:14] == -1).all() and np.isnan(found.probability[:, 2, 10:14, 10:14]).all() and (found.label == -1).sum() == 16


def test_errors(case, forest):
    grey, _, marks = case
    for call, words in ((lambda: Segmenter(CODES).predict(grey), "not learned"), (lambda: Segmenter(CODES).fit(grey, marks), "ignore=255"), (lambda: Segmenter(CODES).fit(grey, marks[:2], ignore=255), "differ"),
                        (lambda: Segmenter(CODES).fit(grey, marks.where(marks != 20, 255), ignore=255), "binder"), (lambda: Segmenter(["a"]), "two or more"), (lambda: Segmenter(CODES, network="vgg"), "segnet"),
                        (lambda: forest.predict(grey[0]), "single slices"), (lambda: Segmenter(CODES, dims=3).fit(grey[0], marks[0], ignore=255), "dims=2")):
        with pytest.raises(BattError, match=words): call()


def test_folders_of_segmentpy(case, tmp_path):
    grey, truth, _ = case
    for k in (100, 7):
        tifffile.imwrite(tmp_path/f"{k}.tif", grey.values[k % 8]); tifffile.imwrite(tmp_path/f"{k}_label.tif", truth.values[k % 8].astype("f4"))
    pairs = read_pairs(tmp_path, pixel=.5)
    assert pairs.frame.values.tolist() == [7, 100] and np.array_equal(pairs.label[0], truth[7]) and np.array_equal(pairs.image[1], grey[4]) and pairs.y.attrs["units"] == "µm"
    m = Segmenter(CODES, network="forest", trees=10, progress=False).fit(pairs.image, pairs.label) # dense labels
    files = write_slices(m.predict(pairs.image).label, tmp_path/"out")
    assert len(files) == 2 and tifffile.imread(files[0]).dtype == np.uint8 and (tifffile.imread(files[0]) == truth.values[7]).mean() > .85
    (tmp_path/"7.tif").unlink()
    with pytest.raises(BattError, match="7_label.tif"): read_pairs(tmp_path)
    with pytest.raises(BattError, match="_label.tif"): read_pairs(tmp_path/"out")


@needs_data
def test_sectors_of_the_21700_slice_left_out_whole():
    cell = DATA/"xct"/"battery-21700"
    image = xr.DataArray(tifffile.imread(cell/"Battery_21700.tif").astype("f4"), dims=("y", "x"))
    brush = tifffile.imread(cell/"Battery_21700_labels.tif")
    assert (brush > 0).sum() == 974
    y, x = np.mgrid[:1568, :1568]
    quarter = (y > 810) & (x > 745) # of the windings
    known = np.where(quarter, 0, brush)
    half = dict(y=slice(760, None), x=slice(700, None)) # what is asked about, with a margin
    m = Segmenter({f"class {k}": k for k in range(1, 7)}, network="forest", context=0, adapt=False, trees=40, gap=20, progress=False, tile=400).fit(image, image.copy(data=known), ignore=0)
    found = m.predict(image.isel(half)).label.values
    asked = brush[760:, 700:]*quarter[760:, 700:]
    right = (found == asked)[asked > 0]
    assert right.size > 150 and right.mean() > .9, right.mean()


def test_classifier_of_curves_and_images(tmp_path):
    r, x = np.random.default_rng(0), np.linspace(0, 1, 96)
    def curves(n):
        kinds = np.resize(["one", "two"], n)
        return xr.DataArray(np.stack([np.exp(-((x - .3 - .02*r.normal())/.03)**2) + (k == "two")*.6*np.exp(-((x - .7)/.03)**2) + .1*r.normal(size=96) for k in kinds]), {"frame": np.arange(n), "two_theta": x}, ("frame", "two_theta")), kinds
    data, kinds = curves(80)
    m = Classifier(["one", "two"], width=4, depth=3, epochs=12, lr=1e-2, progress=False).fit(data, kinds)
    new, truth = curves(60)
    found = m.predict(new)
    assert (found.kind.values == truth).mean() > .95 and found.probability.dims == ("class", "frame") and np.allclose(found.probability.sum("class"), 1)
    again = Classifier.load(m.save(tmp_path/"c.safetensors"))
    assert np.array_equal(again.predict(new).probability, found.probability) and again.report_.attrs["ece"] == m.report_.attrs["ece"]
    new[3, 4] = np.nan
    assert m.predict(new).kind.values[3] == "" and m.predict(new).attrs["missing"] == 1
    with pytest.raises(BattError, match="50 points"): m.predict(new[:, :50])
    with pytest.raises(BattError, match="no class"): Classifier(["a", "b"]).fit(data, kinds)
    images = xr.DataArray(np.stack([ndimage.gaussian_filter(r.normal(size=(24, 24)), s) for s in np.resize([.3, 2.], 60)]), dims=("frame", "y", "x"))
    names = np.resize(["sharp", "soft"], 60)
    assert (Classifier(["sharp", "soft"], dims=2, width=4, depth=2, epochs=10, lr=1e-2, progress=False).fit(images[:40], names[:40]).predict(images[40:]).kind.values == names[40:]).mean() > .9
