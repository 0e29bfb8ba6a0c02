"""Scores without a reference against known faults, and the ranker on images, faults and seeds that the notebook does not use."""
import numpy as np
import pytest
import xarray as xr
from scipy import ndimage
from scipy.stats import spearmanr

from batt_nb import learn
from batt_nb.cleaning.assessment import (FAULTS, FLOOR, SCORES, QualityRanker, degrade_batch, draw_strengths, edge_width, flag_frames, noise_1d, noise_2d, resolution_2d, ring_strength, score_quality, spike_share, true_error, watch_quality)
from batt_nb.core import BattError, history
from conftest import DATA, needs_data

torch = pytest.importorskip("torch")


pytestmark = pytest.mark.usefixtures("one_thread")


def grains(seed, shape=(128, 128), blur=0.7, noise=0.04):
    """Another phantom than the notebook's: a thresholded random field with a fine second phase."""
    rng = np.random.default_rng(seed)
    field = lambda s: (lambda f: f/f.std())(ndimage.gaussian_filter(rng.normal(size=shape), s))
    labels = (field(6) > 0).astype(int) + ((field(3) > 0.8))
    grey = ndimage.gaussian_filter(np.array([0.1, 0.9, 1.3])[labels], blur) + rng.normal(0, noise, shape)
    return 9000 + 20000*grey


def stack(images, dim="frame"): return xr.DataArray(np.stack(images), dims=(dim, "y", "x"), name="image", attrs={"units": "counts"})


@pytest.mark.parametrize("sigma", [300.0, 1500.0, 6000.0])
def test_noise_of_images_and_curves(sigma):
    rng = np.random.default_rng(1)
    assert noise_2d(grains(2, noise=0.0) + rng.normal(0, sigma, (128, 128))) == pytest.approx(sigma, rel=0.1)
    x = np.cumsum(rng.uniform(0.2, 2, 3000))
    assert noise_1d(x, 5*sigma*np.sin(x/60) + rng.normal(0, sigma, 3000)) == pytest.approx(sigma, rel=0.08)


def test_blur_widens_edges_and_noise_takes_resolution():
    bare, rng = grains(3, (256, 256), blur=0.0, noise=0.0), np.random.default_rng(2)
    for noise in (50, 1000):
        widths = [edge_width(i, noise_2d(i)) for b in (0.8, 1.5, 2.5) for i in [ndimage.gaussian_filter(bare, b) + rng.normal(0, noise, bare.shape)]]
        assert np.array(widths)/2.3548 == pytest.approx([0.8, 1.5, 2.5], rel=0.35) and (np.diff(widths) > 0).all()
    finest = [resolution_2d(ndimage.gaussian_filter(bare, 1) + rng.normal(0, s, bare.shape)) for s in (100, 3000, 12000)]
    assert (np.diff(finest) > 0).all()
    assert resolution_2d(rng.normal(size=(128, 128))) > 20 # noise alone has no resolution


def test_rings_about_the_given_center_are_found_and_noise_is_not():
    rng, (i, j) = np.random.default_rng(3), np.indices((256, 256))
    r = np.hypot(i - 140, j - 110).astype(int)
    profile = rng.normal(size=400)
    grey = grains(4, (256, 256))
    strong, weak = (ring_strength(grey + a*profile[r], (140, 110)) for a in (2500, 800))
    assert strong == pytest.approx(2500*profile[:160].std(), rel=0.3) and weak == pytest.approx(800*profile[:160].std(), rel=0.35)
    assert ring_strength(grey + 2500*profile[r], (100, 160)) < 0.4*strong # about another center there are none
    assert ring_strength(grey + rng.normal(0, 2500, grey.shape), (140, 110)) < 200


def test_spikes_are_counted():
    rng = np.random.default_rng(4)
    grey, hit = grains(5), np.random.default_rng(5).random((128, 128)) < 0.004
    assert spike_share(np.where(hit, 60000.0, grey), noise_2d(grey)) == pytest.approx(hit.mean(), rel=0.1) and spike_share(grey, noise_2d(grey)) < 1e-4
    y = np.sin(np.arange(2000)/50) + rng.normal(0, 0.01, 2000)
    y[[100, 700, 1500]] += 1
    assert spike_share(y, 0.01) == pytest.approx(3/2000)


def test_each_fault_moves_its_own_score():
    grey, (i, j), rng = grains(6, (192, 192)), np.indices((192, 192)), np.random.default_rng(6)
    r = np.hypot(i - 95.5, j - 95.5).astype(int)
    faults = {"clean": grey, "noise_sigma": grey + rng.normal(0, 4000, grey.shape), "edge_width": ndimage.gaussian_filter(grey, 2.5), "ring_strength": grey + 3000*rng.normal(size=300)[r],
              "shading": grey*(1 - 0.5*j/192), "clipped_share": np.clip(grey, 12000, 25000), "intensity_drift": grey*1.4}
    s = score_quality(stack(list(faults.values())))
    for k, name in enumerate(faults):
        if k: assert int(s[name].values.argmax()) == k, name
    assert s.intensity_drift[-1] == pytest.approx(0.4, abs=0.05) and history(s)[-1]["function"] == "cleaning.assessment.score_quality"
    assert all(v.attrs["meaning"] == SCORES[n][3] and v.attrs["units"] for n, v in s.data_vars.items()) and s.noise_sigma.attrs["units"] == "counts"


def test_spectra_and_patterns():
    rng, e = np.random.default_rng(7), np.arange(700.0, 740.0, 0.1)
    mu = xr.DataArray(np.arctan(e - 715)[None] + rng.normal(0, 1, (3, e.size))*np.array([0.002, 0.01, 0.05])[:, None], dims=("time", "energy"), coords={"energy": ("energy", e, {"units": "eV"})}, name="mu")
    s = score_quality(mu)
    assert s.noise_sigma.values == pytest.approx([0.002, 0.01, 0.05], rel=0.2) and (np.diff(s.snr) < 0).all() and (np.diff(s.resolution) > 0).all() and s.resolution.attrs["units"] == "eV"
    t = np.arange(10.0, 60.0, 0.02)
    counts = xr.DataArray(rng.poisson(np.outer([1, 6], 30 + 900*np.exp(-((t - 30)/0.1)**2))).astype(float), dims=("time", "two_theta"), coords={"two_theta": t}, name="intensity")
    d = score_quality(counts)
    assert d.poisson_ratio.values == pytest.approx([1, 1], abs=0.08) and d.attrs["kind"] == "diffractogram" and (d.signal_to_background > 10).all()
    assert score_quality(counts*2).poisson_ratio.values == pytest.approx([2**0.5]*2, abs=0.12) # doubled counts are not raw ones


def test_chunks_give_the_same_and_nan_stays_nan():
    images = stack([grains(k, (64, 64)) for k in range(6)])
    images[2] = np.nan
    before, whole = images.copy(deep=True), score_quality(images)
    lazy = score_quality(images.chunk(frame=2, y=20))
    assert lazy.noise_sigma.chunks is not None and lazy.intensity_drift.chunks is not None
    xr.testing.assert_allclose(lazy.compute(), whole)
    xr.testing.assert_identical(images, before)
    assert np.isnan(whole.snr[2]) and np.isfinite(whole.snr[3])
    for bad, words in ((images.rename(y="row"), "neither"), (images[:, :8], "at least 16")):
        with pytest.raises(BattError, match=words): score_quality(bad)


@needs_data
def test_the_real_neutron_sinogram_has_stripes():
    from PIL import Image
    files = [f for f in sorted((DATA/"sinograms").rglob("*.tif*")) if "sino" in f.name.lower()]
    if not files: pytest.skip("no sinogram as TIFF")
    raw = np.asarray(Image.open(files[0]), float)
    s = score_quality(xr.DataArray(raw, dims=("angle", "x")))
    smooth = score_quality(xr.DataArray(raw - (raw.mean(0) - ndimage.median_filter(raw.mean(0), 15)), dims=("angle", "x")))
    assert float(smooth.stripe_strength) < 0.6*float(s.stripe_strength)


# the ranker

def test_steins_estimate_is_the_error_to_the_structure():
    """Copies of images with known structure: blur, fading, noise, and noise with smoothing."""
    g, truth = learn.generator(1, "stein"), torch.from_numpy(np.stack([grains(k, noise=0.0) for k in range(6)]).astype("float32"))
    truth = (truth - truth.mean())/truth.std()
    own = truth + 0.3*torch.randn(truth.shape, generator=g)
    for strength in ([1.0, 0, 0, 0, 0], [0, 0, 0.0, 0.5, 0], [0, 0, 0, 0, 1.2], [0, 0, 0, 0.4, 0.8], [2.0, 0, 0, 0.3, 0]):
        s = torch.tensor(strength).repeat(6, 1)
        if s[0, 4] > 0: # smoothed everywhere; the kind away from edges is not linear
            from batt_nb.cleaning.assessment import _fft_blur
            copy = _fft_blur(degrade_batch(own, s*torch.tensor([1.0, 1, 1, 1, 0]), g), s[:, 4])
        else: copy = degrade_batch(own, s, g)
        found, want = true_error(copy, own, s, torch.full((6,), 0.3)), ((copy - truth)**2).mean((1, 2)).sqrt()
        assert found.numpy() == pytest.approx(want.numpy(), rel=0.06, abs=0.01), strength


STRENGTHS = np.linspace(0, 1, 6)
i, j = np.indices((128, 128))
KINDS = {"noise": lambda v, s, g: v + 12000*s*g.normal(size=v.shape), "blur": lambda v, s, g: ndimage.gaussian_filter(v, 4*s), "rings": lambda v, s, g: v + 8000*s*g.normal(size=300)[np.hypot(i - 60, j - 70).astype(int)],
         "unseen stripes": lambda v, s, g: v + 8000*s*g.normal(size=128), "unseen spikes": lambda v, s, g: np.where(g.random(v.shape) < 0.03*s, 60000, v)}


@pytest.fixture(scope="module")
def ranker(): return QualityRanker().fit(stack([grains(k) for k in range(20, 30)]), seed=4, epochs=9, progress=False)


def test_rank_correlation_on_images_not_learned_from(ranker):
    for name, fault in KINDS.items():
        v = np.array([[fault(grains(40 + k), s, np.random.default_rng([k, int(100*s)])) for s in STRENGTHS] for k in range(4)])
        score = ranker.score(xr.DataArray(v, dims=("image", "strength", "y", "x"))).score.values
        rho = -spearmanr(np.broadcast_to(STRENGTHS, score.shape).ravel(), score.ravel())[0]
        assert rho > (0.9 if name.startswith("unseen") else 0.95), (name, rho)


def test_sigma_of_the_score_holds(ranker):
    """Against the error to the noise-free phantom, on images and faults that it has not seen."""
    g, unit = learn.generator(8, "held"), lambda v: ((np.stack(v) - ranker.center_)/ranker.scale_).astype("float32")
    own, known = (unit([grains(k, noise=n) for k in range(80, 86)]) for n in (0.04, 0.0))
    copies = degrade_batch(torch.from_numpy(own).repeat_interleave(20, 0), draw_strengths(30, 4, g).reshape(-1, 5), g).numpy()
    truth = -20*np.log10(np.sqrt(((copies - np.repeat(known, 20, 0))**2).mean((1, 2))) + FLOOR)
    told = ranker.score(stack(copies*ranker.scale_ + ranker.center_))
    assert 0.85 < float((np.abs(told.score - truth) < 1.96*told.score_sigma).mean()) <= 1 and abs(float((told.score - truth).mean())) < 1.5


def test_a_ranker_is_one_file_and_repeats(ranker, tmp_path):
    images = stack([grains(50), ndimage.gaussian_filter(grains(51), 3)])
    path = ranker.save(tmp_path/"r.safetensors")
    again = QualityRanker.load(path)
    xr.testing.assert_equal(again.score(images), ranker.score(images))
    lazy = again.score(images.chunk(frame=1))
    assert lazy.score.chunks is not None and lazy.score.values == pytest.approx(again.score(images).score.values, rel=1e-6)
    a, b, c = (QualityRanker(channels=(4, 6)).fit(stack([grains(k, (64, 64)) for k in range(3)]), seed=s, epochs=1, steps=2, progress=False).score(images).score.values for s in (1, 1, 2))
    assert (a == b).all() and (a != c).any()
    assert set(FAULTS) == set(ranker.faults) and "dB" in repr(ranker)
    with pytest.raises(BattError, match="another network"): learn.save(torch.nn.Linear(1, 1), {"channels": [4]}, tmp_path/"x.safetensors"); QualityRanker.load(tmp_path/"x.safetensors")


def test_sixteen_bits_are_not_squeezed(ranker):
    """Half of an 8-bit step of the full range still counts."""
    v = grains(60)
    base = ranker.score(stack([v.astype("uint16")])).score.values
    assert ranker.score(stack([(v + 100*np.random.default_rng(1).normal(size=v.shape)).astype("uint16")])).score.values != base
    np.testing.assert_allclose(ranker.score(stack([v.astype("uint16")])).score, ranker.score(stack([v.astype("uint16").astype("float64")])).score)


def test_choosing_flagging_and_stopping(ranker):
    noisy = stack([grains(70 + k) + np.random.default_rng(k).normal(0, 7000, (128, 128)) for k in range(3)])
    picked = ranker.choose({s: noisy.copy(data=ndimage.gaussian_filter(noisy.values, (0, s, s)) if s else noisy.values) for s in (0, 0.7, 1.2, 6.0)})
    assert picked.attrs["best"] in (0.7, 1.2) and picked.sizes["candidate"] == 4
    g = np.random.default_rng(2)
    score = xr.Dataset({"score": ("time", np.r_[g.normal(10, 0.3, 30), g.normal(7, 0.3, 10)])})
    score["score"][12], score["score"][20] = 6.0, np.nan
    flags = flag_frames(score.isel(time=slice(0, 30)))
    assert np.flatnonzero(flags.bad).tolist() == [12, 20] and flags.attrs["flagged"] == 2
    assert watch_quality(score.isel(time=slice(0, 12))).attrs["stop"] == -1
    assert 30 <= watch_quality(score.isel(time=[t for t in range(40) if t not in (12, 20)])).attrs["stop"] + 2 <= 34


@pytest.mark.slow
def test_a_person_refines_it(ranker, tmp_path):
    own, other = QualityRanker.load(ranker.save(tmp_path/"r.safetensors")), lambda a: (stack([grains(k) + 4000*np.random.default_rng(k).normal(size=(128, 128)) for k in a]),
                                                                                     stack([grains(k) + 3000*np.random.default_rng(k).normal(size=300)[np.hypot(i - k, j - 60).astype(int)] for k in a]))
    agree = lambda r: float((r.score(asked[0]).score > r.score(asked[1]).score).mean())
    asked = other(range(100, 120))
    before = agree(own)
    own.refine(*other(range(130, 160)), stack([grains(k) for k in range(20, 30)]), epochs=4, progress=False)
    assert agree(own) > max(before, 0.8) and own.pairs_ == 30
