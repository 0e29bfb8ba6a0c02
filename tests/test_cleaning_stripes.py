"""Stripes of sinograms and rings of slices against known truth."""
import json

import numpy as np
import pytest
import xarray as xr

from batt_nb.cleaning.stripes import KINDS, METHODS, find_stripes, remove_rings, remove_stripes
from batt_nb.core import BattError, history, stream
from batt_nb.twin import xct_artefacts as artefact
from conftest import DATA, needs_data


def particles(seed, nx=256, na=360):
    """Line integrals (angle, x) of discs in a binder, their chords in closed form."""
    rng, R = stream(seed, "test stripes"), 0.42*nx
    angle, x = 180*np.arange(na)/na, np.arange(nx) - nx//2
    objects, out = [(0.0, 0.0, R, 0.25)], np.zeros((na, nx))
    for _ in range(1500):
        r, rho, phi = rng.uniform(3, 13), (R - 14)*np.sqrt(rng.uniform()), rng.uniform(0, 2*np.pi)
        c = rho*np.cos(phi), rho*np.sin(phi)
        if any((c[0] - a)**2 + (c[1] - b)**2 < (1.1*(r + q))**2 for a, b, q, _ in objects[1:]): continue
        objects.append((*c, r, 0.75))
    for a, b, r, mu in objects:
        s = a*np.cos(np.deg2rad(angle)) - b*np.sin(np.deg2rad(angle))
        out += sum(2*mu*np.sqrt(np.maximum(r*r - (x + d - s[:, None])**2, 0)) for d in (-0.33, 0, 0.33))/3
    return xr.DataArray((1.6*out/np.percentile(out, 99)).astype(np.float32), {"angle": angle, "x": 0.65*np.arange(nx)}, ("angle", "x"), "line_integral", {"units": "1", "pixel_size_um": 0.65})


def spoil(clean, seed, photons=110_000, **strength):
    t = np.exp(-clean).rename("transmission").assign_attrs(clean.attrs)
    for name, s in strength.items(): t = getattr(artefact, f"{name}_stripes")(t, strength=s, seed=seed)
    return (-np.log(artefact.noise(t, seed=seed, photons=photons).clip(min=1e-4))).rename("line_integral").assign_attrs(clean.attrs)


def picture(s):
    from skimage.transform import iradon
    n = s.sizes["x"]
    return xr.DataArray(iradon(s.values.T, theta=s.angle.values, circle=True).astype(np.float32), {"y": np.arange(n)*1.0, "x": np.arange(n)*1.0}, ("y", "x"), "image", {"units": "1/pixel"})


def psnr(a, truth): return 10*np.log10(np.ptp(truth.values)**2/np.mean(np.square((a - truth).values)))


@pytest.fixture(scope="module")
def scan():
    clean = particles(51)
    return clean, spoil(clean, 51, gain=6, wide=3, dead=3), spoil(clean, 51)


@pytest.fixture(scope="module")
def cleaned(scan): return remove_stripes(scan[1])


def test_auto_beats_every_classical_method(scan, cleaned):
    clean, striped, free = scan
    truth = picture(clean)
    auto, best = psnr(picture(cleaned), truth), max(psnr(picture(remove_stripes(striped, method=m)), truth) for m in METHODS)
    assert auto > best + 2 and auto > psnr(picture(striped), truth) + 8
    assert auto > psnr(picture(remove_stripes(striped, use_object=False)), truth) - 0.3 # the second pass does not spoil


@pytest.mark.parametrize("seed", [52, 53, 54])
def test_nothing_invented(seed):
    clean = particles(seed)
    for s in (clean, spoil(clean, seed), spoil(clean, seed, photons=5000)):
        out = remove_stripes(s)
        assert out.stripe_rms <= out.stripe_harm and out.stripe_rms < 0.001
    image = picture(s)
    one = remove_rings(image)
    assert one.ring_rms <= one.ring_harm and one.ring_rms < 0.03*float(image.std())


def test_the_harm_is_of_the_size_of_the_error():
    ratio = []
    for seed in (55, 56, 57):
        clean = particles(seed)
        s = spoil(clean, seed, gain=4, wide=1)
        f = find_stripes(s)
        e = f.stripe.values + np.log(s.true_gain.values*s.true_wide_gain.values)
        e -= np.convolve(np.pad(e, 16, mode="reflect"), np.ones(33)/33, "valid") # wider than 30 columns is not claimed
        ratio.append(e[12:-12].std()/float(f.harm))
    assert 0.15 < min(ratio) and max(ratio) < 3, ratio


def test_classes_of_columns(scan, cleaned):
    striped = scan[1]
    kind = find_stripes(striped).kind.values
    inside = np.abs(np.arange(256) - 128) < 100
    stuck = (striped.true_dead.values > 0.9) & inside
    assert (kind[stuck] == KINDS.index("dead")).all()
    large = (np.abs(np.log(striped.true_gain.values)) > 0.1) & inside & (striped.true_dead.values == 0)
    assert large.any() and (kind[large] == KINDS.index("narrow")).all()
    wild = artefact.fluctuating_stripes(np.exp(-scan[0]).rename("transmission"), seed=3, share=0.02)
    kinds = find_stripes(-np.log(wild.clip(min=1e-3)), use_object=False).kind.values
    assert (kinds[(wild.true_fluctuation.values > 0) & inside] == KINDS.index("fluctuating")).mean() > 0.8
    report = json.loads(cleaned.stripe_report)
    assert set(report) == set(KINDS[1:]) and report["dead"]["columns_in_all"] == (kind == 1).sum()


def test_stacks_dask_and_history(scan):
    stack = xr.concat(scan[1:], "z").transpose("angle", "z", "x").assign_coords(z=[0.0, 0.65])
    before = stack.copy(deep=True)
    out = remove_stripes(stack, use_object=False)
    lazy = remove_stripes(stack.chunk(z=1), use_object=False)
    assert lazy.chunks is not None and out.dims == stack.dims
    np.testing.assert_allclose(lazy.compute().values, out.values, atol=1e-6)
    np.testing.assert_allclose(find_stripes(stack.chunk(z=1), use_object=False).harm.values, find_stripes(stack, use_object=False).harm.values)
    xr.testing.assert_identical(before, stack)
    assert history(out)[-1]["function"] == "cleaning.stripes.remove_stripes"


def test_a_whole_turn_and_an_odd_scan(scan):
    clean = scan[0]
    whole = xr.concat([clean, clean.isel(x=(np.arange(256, 0, -1) % 256)).assign_coords(x=clean.x, angle=clean.angle + 180)], "angle")
    s = spoil(whole, 58, gain=4)
    e = lambda s, a: float(np.sqrt(np.mean(np.square((s - a).mean("angle") + np.log(s.true_gain))[12:-12])))
    assert e(s, remove_stripes(s)) < 0.45*float(np.log(s.true_gain).std()) # what varies over more than 30 columns is left
    part = s.isel(angle=slice(0, 251)) # a limited angle: the first pass alone
    assert e(part, remove_stripes(part)) < 0.6*float(np.log(s.true_gain).std())


def test_rings(scan):
    truth, ringed = picture(scan[0]), picture(spoil(scan[0], 59, gain=6))
    out = remove_rings(ringed)
    assert psnr(out, truth) > psnr(ringed, truth) + 3
    lazy = remove_rings(xr.concat([ringed, truth], "z").assign_coords(z=[0.0, 1.0]).chunk(z=1))
    assert lazy.chunks is not None
    np.testing.assert_allclose(lazy[0].values, out.values, atol=1e-6)


def test_errors(scan):
    striped = scan[1]
    for call, words in ((lambda: remove_stripes(striped, method="magic"), "magic"), (lambda: remove_stripes(striped.where(striped < 1)), "NaN"), (lambda: remove_stripes(striped, size=3), "size"),
                        (lambda: remove_stripes(striped.rename(angle="turn")), "angle"), (lambda: remove_stripes(striped, significance=0), "significance"),
                        (lambda: remove_rings(picture(striped), center=(3, 3)), "axis")):
        with pytest.raises(BattError, match=words): call()


@needs_data
def test_the_neutron_sinogram():
    import tifffile
    from scipy.ndimage import median_filter
    counts = tifffile.imread(DATA/"sinograms/sinogram_360_neutron_image.tif").astype(np.float32)
    s = xr.DataArray(-np.log(np.maximum(counts, 200)/np.percentile(counts, 97)), {"angle": np.linspace(0, 360, len(counts)), "x": np.arange(counts.shape[1])*1.0}, ("angle", "x"))[:-1]
    out = remove_stripes(s)
    rough = lambda a: float(np.std(a.mean("angle").values - median_filter(a.mean("angle").values, 9))) # what stands out of the mean in single columns
    assert rough(out) < 0.3*rough(s)
    moved = np.abs((s - out).values).mean(0)
    assert np.median(moved) < 0.01 # most columns stay
