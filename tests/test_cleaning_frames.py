"""Flat fields, beam, pixels and the intensity of a series against known truth."""
import numpy as np
import pytest
import xarray as xr

from batt_nb.cleaning.frames import correct_frames, correct_intensity
from batt_nb.core import BattError, flags, history, stream
from batt_nb.twin import xct_artefacts as artefact
from batt_nb.twin.xct import correct_flat, digitize, illuminate
from conftest import DATA, needs_data

ALL = {"beam_drift": 1.0, "beam_decay": 1.0, "flicker": 3.0, "noise": 1.0, "fluctuating_stripes": 1.0, "dead_stripes": 1.0, "zingers": 3.0, "read_noise": 1.0}


def rms(a): return float(np.sqrt(np.nanmean(np.square(np.asarray(a, float)))))


def spheres(seed, frames=24, rows=72, columns=128, speed=0.0):
    rng = stream(seed, "test spheres")
    z, x, k = np.arange(rows)[:, None], np.arange(columns), np.arange(frames)
    out = np.zeros((frames, rows, columns), np.float32)
    for _ in range(70):
        r, cz, rho, phi = rng.uniform(5, 11), rng.uniform(-5, rows + 5), rng.uniform(0, 0.32*columns), rng.uniform(0, 2*np.pi)
        cx = columns/2 + rho*np.cos(phi + (0 if speed else np.pi*k/frames))*np.ones(frames)
        out += 0.005*2*np.sqrt(np.maximum(r*r - (z - cz)**2 - (x - cx[:, None, None])**2, 0))*(1 + 0.3*(x < columns/2 - 12 + speed*k[:, None, None]) if speed else 1)
    return xr.DataArray(np.exp(-out), {"angle": 180*k/frames, "z": 0.65*np.arange(rows), "x": 0.65*np.arange(columns)}, ("angle", "z", "x"), "transmission", {"units": "1", "pixel_size_um": 0.65})


def camera(transmission, artefacts, seed):
    ds = illuminate(transmission, n_flats=16, n_darks=8, period_s=0.5, seed=seed)
    ds = ds.assign_coords(flat_time=("flat", np.r_[ds.flat_time.values[8:], 0.5*(ds.sizes["angle"] + np.arange(8))]))
    for name in (n for n in artefact.ARTEFACTS if n in artefacts): ds = artefact.ARTEFACTS[name](ds, strength=artefacts[name], seed=seed)
    return digitize(ds)


@pytest.fixture(scope="module")
def scan():
    truth = spheres(21)
    return -np.log(truth), camera(truth, ALL, 21), camera(truth, {"noise": 1.0, "read_noise": 1.0}, 21)


@pytest.fixture(scope="module")
def fixed(scan): return correct_frames(scan[1])


def test_all_artefacts_leave_little_more_than_noise(scan, fixed):
    lines, spoiled, noisy = scan
    real = (spoiled.true_dead > 0.9) | (spoiled.true_fluctuation > 0) | spoiled.true_zinger
    floor = rms(correct_flat(noisy) - lines)
    assert rms((fixed - lines).where(~real)) < 1.35*floor
    assert rms((correct_flat(spoiled) - lines).where(~real)) > 1.5*floor # there was something to correct
    assert rms((fixed - lines).where(real)) < 4*floor and int(fixed.masked.sum()) == 0


def test_eigen_flats_beat_the_mean_flat_only_where_the_beam_moves(scan, fixed):
    lines, spoiled, noisy = scan
    stripes = lambda a: rms((a - lines).median("x") - (a - lines).median(("x", "z")))
    assert fixed.eigen_flats >= 1 and correct_frames(noisy).eigen_flats == 0
    assert stripes(fixed) < 0.5*stripes(correct_frames(spoiled, method="mean"))


def test_intensity_of_the_beam_and_its_sigma(scan, fixed):
    spoiled = scan[1]
    error = fixed.beam_intensity.values - (spoiled.true_beam_current*spoiled.true_flicker).values
    error -= error.mean()
    assert error.std() < 0.1*float((spoiled.true_beam_current*spoiled.true_flicker).std()) and 0.4 < (error/fixed.beam_intensity_sigma.values).std() < 2


def test_clean_data_change_less_than_the_stated_harm(scan):
    for data in (scan[2], camera(spheres(22), {}, 22), camera(spheres(23), {"noise": 1.0, "read_noise": 1.0}, 23)):
        out = correct_frames(data)
        assert rms(out - correct_flat(data)) <= rms(out.harm) + 1e-6
        assert out.bad_pixels <= 1 and int(out.zingers.sum()) <= 1


def test_hits_are_found_and_the_sample_is_not_hit(scan):
    truth = spheres(24)
    parts = {"noise": 1.0, "read_noise": 1.0}
    with_hits, without = (camera(truth, parts | extra, 24) for extra in ({"zingers": 5.0}, {}))
    size = with_hits.projections.values.astype(float) - without.projections.values
    found = np.isnan(correct_frames(with_hits, fill=False).values)
    found &= ~found.all(0) # bad pixels
    big = size > 15000
    assert (big & found).sum() >= 0.95*big.sum() > 10 and (found & (size < 300)).sum() <= found.shape[0]


def test_a_front_stays(scan):
    truth = spheres(25, speed=1.0)
    lines, k = -np.log(truth), np.arange(24)
    base = lines/(1 + 0.3*(np.arange(128) < 52 + k[:, None, None]))
    fixed = correct_frames(camera(truth, ALL, 25))

    def place(line):
        u, out = np.linspace(-1, 1, 128), []
        for i, (f, b) in enumerate(zip(line.values.mean(1), base.values.mean(1), strict=True)):
            tries = 51.5 + i + np.arange(-6, 6.01, 0.1)
            fit = lambda c, f=f, b=b: (A := np.stack([b, b/(1 + np.exp((np.arange(128) - c)/0.3)), np.ones(128), u, u*u], 1)) @ np.linalg.lstsq(A, f, rcond=None)[0]
            out.append(tries[int(np.argmin([np.square(f - fit(c)).sum() for c in tries]))])
        return np.array(out)
    assert np.abs(place(fixed) - place(lines)).max() < 0.5


def test_dask_gives_the_same_without_computing(scan, fixed):
    lazy = correct_frames(scan[1].chunk(angle=7))
    assert lazy.chunks is not None and lazy.harm.chunks is not None
    np.testing.assert_allclose(lazy.compute().values, fixed.values, atol=2e-6)
    np.testing.assert_array_equal(lazy.zingers.compute().values, fixed.zingers.values)


def test_impossible_values_are_masked_and_counted(scan):
    dark = scan[2].copy(deep=True)
    dark.projections[3, 10:12, 60:63] = 20
    out = correct_frames(dark)
    assert int(out.masked[3]) == 6 and int(np.isnan(out).sum()) == 6 and int(out.masked.sum()) == 6


def test_a_series_has_leading_dimensions_and_history(scan, fixed):
    two = scan[1].assign(projections=xr.concat([scan[1].projections]*2, "time").assign_coords(time=[0.0, 900.0]))
    out = correct_frames(two)
    assert out.dims == ("time", "angle", "z", "x") and out.harm.dims == ("time", "angle")
    np.testing.assert_allclose(out[1].values, fixed.values, atol=1e-5)
    assert history(fixed)[-1]["function"] == "cleaning.frames.correct_frames" and fixed.units == "1"


def test_no_air_is_said_and_errors_say_what(scan):
    inside = camera(spheres(26).isel(x=slice(34, 94)), {"noise": 1.0}, 26)
    assert any("no air" in f for f in flags(correct_frames(inside)))
    for call, words in ((lambda: correct_frames(scan[1].drop_vars("darks")), "no darks"), (lambda: correct_frames(scan[1], method="best"), "best"),
                        (lambda: correct_frames(scan[1], output="mu"), "mu"), (lambda: correct_frames(scan[1], air=[1, 2]), "air")):
        with pytest.raises(BattError, match=words): call()


def discs(seed, frames=30, rows=96, columns=128):
    rng, y, x = stream(seed, "test discs"), np.arange(rows)[:, None], np.arange(columns)
    share = np.zeros((rows, columns))
    for _ in range(60): share = np.maximum(share, np.clip(rng.uniform(4, 12) - np.hypot(y - rng.uniform(0, rows), x - rng.uniform(0, columns)) + 0.5, 0, 1))
    image = 0.5 + 0.5*share*(1 - 0.2*(x < 50 + np.arange(frames)[:, None, None]))
    return xr.DataArray(image.astype(np.float32), {"time": 60.0*np.arange(frames), "y": np.arange(rows)*1.0, "x": np.arange(columns)*1.0}, ("time", "y", "x"), "image", {"units": "1"})


def spoil(images, seed, drift=0.02, shade=0.1):
    rng = stream(seed, "test intensity")
    path = np.r_[0, np.cumsum(drift*rng.standard_normal(images.sizes["time"] - 1))]
    field = shade*(np.linspace(-1, 1, images.sizes["x"]) - 0.5*np.linspace(-1, 1, images.sizes["y"])[:, None]**2)
    return images.copy(data=((images.values + 0.02*rng.standard_normal(images.shape))*np.exp(path[:, None, None] + field)).astype(np.float32)), np.exp(path), field


def test_drift_and_shading_are_found_beside_a_front():
    clean = discs(31)
    seen, gain, field = spoil(clean, 31)
    out = correct_intensity(seen)
    assert rms(out.intensity - gain) < 0.1*gain.std()
    left = np.log(out.mean("time")/clean.mean("time"))
    assert float((left - left.mean()).std()) < 0.3*field.std()
    step = lambda a: np.log(a[5, :, 60:75].mean()/a[29, :, 60:75].mean()) # what the front did to the discs is still there
    assert abs(float(step(out) - step(clean))) < 0.15*abs(float(step(clean)))


def test_a_steady_series_stays_within_its_harm():
    for seed in (32, 33):
        still = spoil(discs(seed), seed, drift=0.0, shade=0.0)[0]
        out = correct_intensity(still)
        assert rms(out - still) <= out.intensity_harm < 0.03


def test_frames_that_cannot_be_followed_are_masked():
    seen, _, _ = spoil(discs(34), 34)
    seen[20:] = seen[20:, ::-1, ::-1].values
    out = correct_intensity(seen)
    assert out.masked_frames == 10 and bool(np.isnan(out[20:]).all()) and bool(np.isfinite(out[:20]).all())
    assert float(out.still_share[20]) < 0.5 < float(out.still_share[19])


def test_intensity_with_dask_region_and_errors():
    seen, gain, _ = spoil(discs(35), 35)
    lazy = correct_intensity(seen.chunk(time=8))
    assert lazy.chunks is not None
    np.testing.assert_allclose(lazy.compute().values, correct_intensity(seen).values, rtol=1e-5)
    region = np.zeros((96, 128), bool); region[:, 90:] = True # the front does not come here
    assert rms(correct_intensity(seen, region=region, order=0).intensity - gain) < 0.003
    with pytest.raises(BattError, match="model"): correct_intensity(seen, model="log")
    with pytest.raises(BattError, match="series"): correct_intensity(seen[0])


@needs_data
def test_the_tooth_scan():
    from batt_nb.campaign import read
    tooth = read(DATA/"sinograms/tooth.h5")
    out = correct_frames(tooth)
    air = lambda a: float(a.isel(x=np.r_[0:60, 580:640]).mean(("y", "x")).std())
    plain = -np.log((tooth.projections - tooth.darks.mean("dark"))/(tooth.flats.mean("flat") - tooth.darks.mean("dark")))
    assert out.air_columns > 10 and air(out) < 0.8*air(plain) and int(out.masked.sum()) == 0
    assert abs(float(out.median() - plain.median())) < 0.01


def warming(seed, counts=100.0, uniform=False, after=True, artefacts=("noise", "read_noise"), photons=800.0):
    """A scan on a detector whose dark current rises and saturates: truth, counts, its pattern, and what a straight line in time between the darks leaves of it in each frame."""
    truth, end = spheres(seed), 12.0
    ds = illuminate(truth, n_flats=16, n_darks=12, period_s=0.5, photons=photons, seed=seed)
    ds = ds.assign_coords(flat_time=("flat", np.r_[ds.flat_time.values[8:], end + 0.5*np.arange(8)]))
    if after: ds = ds.assign_coords(dark_time=("dark", np.r_[ds.dark_time.values[6:], end + 4 + 0.5*np.arange(6)]))
    for name in artefacts: ds = artefact.ARTEFACTS[name](ds, seed=seed)
    rng, t = stream(seed, "test warming"), ds.dark_time.values
    pattern = np.ones((72, 128)) if uniform else 0.6*np.abs(rng.standard_normal((72, 128))) + np.abs(rng.standard_normal(128))
    pattern = pattern/rms(pattern)
    rise = lambda at: counts*(1 - np.exp(-np.maximum(at, 0)/3))
    for name, at in (("projections", "angle_time"), ("flats", "flat_time"), ("darks", "dark_time")): ds[name] = ds[name] + xr.DataArray(rise(ds[at].values), dims=ds[name].dims[0])*xr.DataArray(pattern, dims=("z", "x"))
    line = np.interp(ds.angle_time.values, [t[:6].mean(), t[6:].mean()], [rise(t[:6]).mean(), rise(t[6:]).mean()])
    return -np.log(truth), digitize(ds), pattern, rise(ds.angle_time.values) - line


def dark_left(out, lines, ds, pattern):
    "Counts of the pattern in each corrected frame."
    wrong = (np.exp(-out.values) - np.exp(-lines.values))*(ds.flats.mean("flat") - ds.darks.mean("dark")).values
    p = pattern - np.median(pattern)
    return ((wrong - np.median(wrong, (1, 2), keepdims=True))*p).sum((1, 2))/(p*p).sum()


@pytest.mark.parametrize("seed, artefacts", [(71, ("noise", "read_noise")), (72, ("beam_drift", "flicker", "noise", "zingers", "read_noise"))])
def test_a_dark_that_drifts_is_followed(seed, artefacts):
    lines, ds, pattern, beyond = warming(seed, artefacts=artefacts)
    plain, out = correct_frames(ds, eigen_darks=0), correct_frames(ds)
    before, after = (dark_left(v, lines, ds, pattern) for v in (plain, out))
    assert out.eigen_darks == 1 and rms(before) > 6 and rms(after) < 0.3*rms(before)
    assert 0.4 < rms(after/out.dark_shift_sigma) < 1.6
    off = out.dark_shift.values - np.abs(beyond)
    assert rms(off) < 0.25*rms(beyond) and out.dark_shift.units == "counts"
    assert rms(out - lines) < rms(plain - lines)
    np.testing.assert_allclose(correct_frames(ds.chunk(angle=7)).compute().values, out.values, atol=2e-6)


def test_a_dark_that_cannot_be_told_from_the_sample_is_left_to_interpolation():
    lines, ds, _, beyond = warming(73, uniform=True)
    out = correct_frames(ds)
    assert float(out.dark_shift.max()) == 0 and np.abs(beyond).max() < 3*float(out.dark_shift_sigma.max()) and rms(beyond/out.dark_shift_sigma) < 1.6
    np.testing.assert_allclose(out.values, correct_frames(ds, eigen_darks=0).values, atol=1e-6)
    assert rms(out.harm) > rms(correct_frames(ds, eigen_darks=0).harm)


def test_a_steady_dark_is_left_alone():
    ds = warming(74, counts=0.0)[1]
    out = correct_frames(ds)
    assert out.eigen_darks == 0 and float(out.dark_shift_sigma.max()) == 0
    np.testing.assert_array_equal(out.values, correct_frames(ds, eigen_darks=0).values)
    hit = ds.copy(deep=True); hit.darks[3, 20, 30] += 5000 # a cosmic ray in one dark is no drift
    assert correct_frames(hit).eigen_darks == 0
