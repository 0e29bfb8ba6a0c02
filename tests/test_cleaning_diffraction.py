"""Integration against pyFAI and the oracle, peaks and cells against known truth and calibrated sigmas, phase fractions at two wavelengths, on data that the notebooks do not use."""
import numpy as np
import pytest
import xarray as xr

from batt_nb.cleaning.diffraction import integrate, mask_peaks, parasitic_peaks, plan_of, spacing
from batt_nb.cleaning.patterns import fit_phases, line_pattern
from batt_nb.cleaning.peaks import CU_ALPHA2, GAUSS, PROFILES, fit_peaks, lattice, profile_model, unit_line
from batt_nb.core import BattError, history
from batt_nb.twin import structures, xrd
from batt_nb.twin.xrd_artefacts import count
from conftest import DATA, needs_data, oracle

pyFAI = pytest.importorskip("pyFAI")


def integrator(**over):
    from pyFAI.integrator.azimuthal import AzimuthalIntegrator
    return AzimuthalIntegrator(**dict(dist=0.12, poni1=0.011, poni2=0.013, rot1=0.08, rot2=-0.05, rot3=0.3, pixel1=1e-4, pixel2=1.3e-4, wavelength=0.7e-10) | over)


def stack(n=19, shape=(210, 190), mean=4.0, dtype="uint16", seed=11):
    rng = np.random.default_rng(seed)
    return xr.DataArray(rng.poisson(mean*(1 + rng.random(shape)), (n, *shape)).astype(dtype), dims=("time", "y", "x"), coords={"time": np.arange(n)}, name="intensity")


def by_pyfai(frame, ai, points, **options):
    return ai.integrate1d_ng(np.asarray(frame, "float32"), points, method=(options.pop("split", "bbox"), "csr", "cython"), error_model="poisson", **options)


def close(ours, theirs, rtol=1e-5):
    full = theirs.count > 1e-3
    np.testing.assert_allclose(ours.intensity.values[full], theirs.intensity[full], rtol=rtol)
    np.testing.assert_allclose(ours.intensity_sigma.values[full], theirs.sigma[full], rtol=rtol)


@pytest.mark.parametrize("split", ["no", "bbox", "full"])
@pytest.mark.parametrize("unit, name", [("two_theta", "2th_deg"), ("q", "q_A^-1")])
def test_a_tilted_detector_equals_pyfai(split, unit, name):
    """Low counts (many zeros), rotations, oblong pixels, mask, ranges, polarization."""
    frames, ai, mask = stack(mean=0.7), integrator(), np.zeros((210, 190), bool)
    mask[40:60, 20:120] = True
    limits = {"two_theta": (1.0, 9.0), "q": (0.2, 1.4)}[unit]
    ours = integrate(frames, ai, unit=unit, points=150, split=split, mask=mask, polarization=0.95, radial_range=limits)
    for k in (0, 17): close(ours.isel(time=k), by_pyfai(frames[k], ai, 150, split=split, unit=name, mask=mask, polarization_factor=0.95, radial_range=limits))
    assert ours[unit].values == pytest.approx(by_pyfai(frames[0], ai, 150, split=split, unit=name, mask=mask, radial_range=limits).radial, rel=1e-5)
    assert ours.attrs["wavelength"] == pytest.approx(0.7)


@pytest.mark.parametrize("dtype, dead", [("uint16", 65535), ("uint32", 2**32 - 1), ("int32", -1), (">i4", -2), ("float32", np.nan), ("float64", np.inf)])
def test_dead_pixels_of_single_frames_are_left_out(dtype, dead):
    frames, ai = stack(dtype="float64", mean=300), integrator()
    frames = frames.astype(dtype)
    frames[3, 100:140, 50:150] = dead
    before = frames.values.copy()
    ours = integrate(frames, ai, points=120)
    hole = frames[3].values.astype("float64"); hole[100:140, 50:150] = np.nan
    close(ours.isel(time=3), by_pyfai(hole, ai, 120, unit="2th_deg"))
    close(ours.isel(time=4), by_pyfai(frames[4].values.astype(float), ai, 120, unit="2th_deg"))
    assert np.array_equal(before, frames.values, equal_nan=dtype.startswith("float")) # the input is untouched


def test_solid_angle_flat_variance_and_azimuth_as_pyfai():
    frames, ai = stack(mean=50, n=2), integrator()
    flat, variance = 1 + 0.1*np.random.default_rng(0).random((210, 190)), xr.full_like(frames, 7.0, dtype=float)
    close(integrate(frames, ai, points=100, solid_angle=False).isel(time=1), by_pyfai(frames[1], ai, 100, unit="2th_deg", correctSolidAngle=False))
    close(integrate(frames, ai, points=100, flat=flat).isel(time=1), by_pyfai(frames[1], ai, 100, unit="2th_deg", flat=flat.astype("float32")))
    close(integrate(frames, ai, points=100, azimuth_range=(-60, 40)).isel(time=1), by_pyfai(frames[1], ai, 100, unit="2th_deg", azimuth_range=(-60, 40)))
    theirs = ai.integrate1d_ng(frames[1].values.astype("float32"), 100, unit="2th_deg", method=("bbox", "csr", "cython"), variance=variance[1].values.astype("float32"))
    close(integrate(frames, ai, points=100, variance=variance).isel(time=1), theirs)
    assert "intensity_sigma" not in integrate(frames, ai, points=100, error_model="none")


@needs_data
def test_the_oracle_of_azimuthal_integration():
    """Bins of the no-splitting oracle; its bins are ranges of q, pixel centers decide."""
    for case in oracle("xrd")["azimuthal_integration"]["cases"]:
        i, j = np.mgrid[:512, :512].astype(float)
        center = (250.3, 260.7) if case["name"] == "no_rotation" else (240.0, 270.0)
        r = np.hypot(i - center[0], j - center[1])
        image = 1000*np.exp(-((r - 120)/6)**2) + 400*np.exp(-((r - 200)/4)**2) + 10 + 0.05*j
        g, call = case["geometry"], case["call"]
        ai = integrator(dist=g["dist_m"], poni1=g["poni1_m"], poni2=g["poni2_m"], rot1=g["rot1_rad"], rot2=g["rot2_rad"], rot3=g["rot3_rad"], pixel1=g["pixel_m"], pixel2=g["pixel_m"], wavelength=g["wavelength_m"])
        for want in case["results"]:
            ours = integrate(xr.DataArray(image, dims=("y", "x")), ai, unit="q", points=call["npt"], split="no", radial_range=tuple(call["radial_range"]), solid_angle=want["correctSolidAngle"], error_model="none")
            off = np.abs(ours.intensity.values[want["bin_index"]]/np.array(want["I"]) - 1)
            assert np.median(off) < 1e-6 and off.max() < 2e-3, (case["name"], off) # a pixel at an edge of a bin may move
            assert ours.q.values[want["bin_index"]] == pytest.approx(want["q_A^-1"], rel=1e-6)


def test_dask_monitor_cache_and_history():
    frames, ai = stack(n=40), integrator()
    whole = integrate(frames, ai, points=90)
    lazy = integrate(frames.chunk(time=7), ai, points=90)
    assert lazy.intensity.chunks is not None
    xr.testing.assert_allclose(lazy.compute(), whole, rtol=1e-12)
    assert plan_of(ai, (210, 190), "two_theta", 90, "bbox", None, None, None, True, None, None) is plan_of(ai, (210, 190), "two_theta", 90, "bbox", None, None, None, True, None, None)
    moved = integrator(dist=0.121)
    assert not np.allclose(integrate(frames, moved, points=90).two_theta, whole.two_theta) # another geometry is another matrix
    monitor = xr.DataArray(np.linspace(1, 2, 40), dims="time", coords={"time": frames.time})
    np.testing.assert_allclose(integrate(frames, ai, points=90, monitor=monitor).intensity*monitor, whole.intensity, rtol=1e-10)
    assert history(whole)[-1]["function"] == "cleaning.diffraction.integrate" and whole.intensity_sigma.dims == ("time", "two_theta")


def test_sigma_is_the_scatter_of_repeated_frames():
    rng, ai = np.random.default_rng(4), integrator()
    draws = xr.DataArray(rng.poisson(6.0, (300, 210, 190)).astype("uint16"), dims=("draw", "y", "x"))
    r = integrate(draws, ai, points=60, split="no", solid_angle=False)
    z = ((r.intensity - 6.0)/r.intensity_sigma).values[:, 5:-5]
    assert 0.93 < (np.abs(z) < 1.96).mean() < 0.97 and abs(z.std() - 1) < 0.04


def test_parasites_stand_where_the_cards_and_the_twin_say():
    lines = parasitic_peaks(1.54056, ("Al", "Cu", "Li", "PE", "PP"))
    at = {f"{m} {h}": t for m, h, t in zip(lines.material.values, lines.hkl.values, lines.two_theta.values, strict=True)}
    # PDF 4-0787, 4-0836; polypropylene: 14.1, 16.9, 18.6 deg as commonly listed for its alpha form
    for name, want in {"Al 1 1 1": 38.472, "Al 3 1 1": 78.227, "Cu 1 1 1": 43.297, "Cu 2 2 0": 74.130, "PP 1 1 0": 14.1, "PP 0 4 0": 16.9, "PP 1 3 0": 18.6}.items(): assert at[name] == pytest.approx(want, abs=0.12 if name[:2] == "PP" else 0.02)
    r = structures.reflections(structures.ELEMENTS["Li"], 0.5, 25.0)
    assert parasitic_peaks(0.5, ("Li",)).two_theta.values[:3] == pytest.approx(r.two_theta.values[:3], abs=0.01)
    assert (np.diff(lines.two_theta) >= 0).all() and lines.attrs["wavelength"] == 1.54056
    flat = xr.DataArray(np.ones(2000), dims="two_theta", coords={"two_theta": np.linspace(10, 90, 2000)})
    masked = mask_peaks(flat, lines, width=0.5)
    assert masked.isnull().mean() == pytest.approx(masked.attrs["masked_share"]) and np.isfinite(flat).all()


def draws_of(seed, n=1500, counts=250.0, ground=25.0, profile="pseudo_voigt", eta=0.5, width=0.22, center=31.017):
    x = np.arange(29.6, 32.4, 0.017)
    eta = eta if PROFILES[profile] is None else PROFILES[profile]
    area = counts*width/(eta*2/np.pi + (1 - eta)*GAUSS)
    clean = area*unit_line(x, center, width, eta)[0] + ground - 2*(x - 31)
    da = xr.DataArray(np.random.default_rng(seed).poisson(clean, (n, len(x))).astype(float), dims=("draw", "two_theta"), coords={"two_theta": x}, attrs={"units": "counts"})
    return da, {"center": center, "fwhm": width, "area": area, "height": counts, "background": ground - 2*(center - 31)}


@pytest.mark.parametrize("profile, counts", [("pseudo_voigt", 250.0), ("gaussian", 40.0), ("lorentzian", 150.0)])
def test_intervals_of_a_peak_hold_the_truth(profile, counts):
    da, truth = draws_of(17, counts=counts, profile=profile)
    r = fit_peaks(da, [31.05], profile=profile, window=2.6, width=0.2)
    cover = {k: float((np.abs(r[k] - v) < 1.96*r[f"{k}_sigma"]).mean()) for k, v in truth.items()}
    assert all(0.93 <= c <= 0.97 for c in cover.values()), cover
    assert r.attrs["failed"] == 0 and abs(float(r.area.mean()/truth["area"] - 1)) < 0.005 and abs(float(r.reduced_chi2.mean()) - 1) < 0.03


def test_same_answers_as_lmfit():
    lmfit = pytest.importorskip("lmfit")
    da, _ = draws_of(3, n=5, counts=3000.0)
    ds = xr.Dataset({"intensity": da, "intensity_sigma": np.sqrt(da.clip(min=1))})
    r = fit_peaks(ds, [31.0], window=2.7)
    x = da.two_theta.values
    model = lmfit.models.PseudoVoigtModel() + lmfit.models.LinearModel()
    for k in range(5):
        inside = np.abs(x - 31.0) <= 1.35
        p = model.make_params(center=31.0, amplitude=600, sigma=0.1, fraction=0.5, slope=0, intercept=25)
        f = model.fit(da.values[k][inside], p, x=x[inside], weights=1/ds.intensity_sigma.values[k][inside], scale_covar=False)
        # lmfit's pseudo-Voigt uses sqrt(2 ln 2) sigma_g: same FWHM, areas and shares agree
        for ours, theirs, s in (("center", "center", 1), ("area", "amplitude", 1), ("fwhm", "sigma", 2), ("mixing", "fraction", 1)):
            assert float(r[ours][k, 0]) == pytest.approx(s*f.params[theirs].value, rel=2e-4)
            assert float(r[f"{ours}_sigma"][k, 0]) == pytest.approx(s*f.params[theirs].stderr, rel=0.02)
        assert float(r.reduced_chi2[k, 0]) == pytest.approx(f.redchi, rel=1e-3)


def test_the_jacobian_is_the_derivative():
    x, p = np.linspace(60, 66, 121)[None], np.array([[62.1, 20.0, 0.4, 0.7, 63.9, 9.0, 0.5, 0.1, 3.0, -0.2]])
    for a2 in (None, CU_ALPHA2):
        j = profile_model(x, p, np.array([63.0]), a2)[1]
        for k in range(p.shape[1]):
            h = np.zeros_like(p); h[0, k] = 1e-6*max(1, abs(p[0, k]))
            d = (profile_model(x, p + h, np.array([63.0]), a2)[0] - profile_model(x, p - h, np.array([63.0]), a2)[0])/2/h[0, k]
            assert np.abs(j[..., k] - d).max() < 1e-6*max(1, np.abs(d).max())


def test_a_doublet_gives_the_first_line():
    x = np.arange(77.5, 80.5, 0.02)
    c2 = 2*np.degrees(np.arcsin(np.sin(np.radians(78.87)/2)*1.544426/1.540598))
    clean = 90*unit_line(x, 78.87, 0.2, 0.6)[0] + 45*unit_line(x, c2, 0.2, 0.6)[0] + 40
    da = xr.DataArray(np.random.default_rng(2).poisson(clean, (400, len(x))).astype(float), dims=("draw", "two_theta"), coords={"two_theta": x}, attrs={"units": "counts"})
    r, plain = fit_peaks(da, [78.9], alpha2=CU_ALPHA2, window=2.6), fit_peaks(da, [78.9], window=2.6)
    assert 0.93 <= float((np.abs(r.center - 78.87) < 1.96*r.center_sigma).mean()) <= 0.97
    assert float(plain.center.mean()) - 78.87 > 0.02 # what leaving the companion out does


def test_lines_that_come_and_go_have_areas_about_zero():
    rng, n = np.random.default_rng(8), 120
    x, share = np.arange(10.0, 12.0, 0.01), np.r_[np.zeros(70), np.linspace(0, 1, 50)]
    clean = 30 + 25*share[:, None]*unit_line(x, 11.03 - 0.1*share[:, None], 0.08, 0.3)[0]
    da = xr.DataArray(rng.poisson(clean).astype(float), dims=("time", "two_theta"), coords={"time": np.arange(n), "two_theta": x}, attrs={"units": "counts"})
    r = fit_peaks(da, [11.02], track="time", window=0.9, width=0.08)
    z = (r.area.values[:70, 0]/r.area_sigma.values[:70, 0])
    assert abs(z.mean()) < 0.35 and 0.8 < z.std() < 1.2 and not r.detected.values[:70].any() and np.isnan(r.center.values[:70]).all()
    late = slice(85, 120)
    assert r.detected.values[late].all() and np.abs(r.center.values[late, 0] - (11.03 - 0.1*share[late])).max() < 0.02
    assert np.mean(np.abs((r.area.values[late, 0] - 25*share[late])/r.area_sigma.values[late, 0]) < 1.96) > 0.88 and r.attrs["failed"] == 0


def test_overlapping_lines_are_one_problem():
    x = np.arange(20.0, 23.0, 0.015)
    clean = 20 + 40*unit_line(x, 21.3, 0.2, 0.4)[0] + 25*unit_line(x, 21.55, 0.2, 0.4)[0]
    da = xr.DataArray(np.random.default_rng(1).poisson(clean, (500, len(x))).astype(float), dims=("draw", "two_theta"), coords={"two_theta": x}, attrs={"units": "counts"})
    r = fit_peaks(da, [21.3, 21.55], window=2.0, width=0.2)
    for k, (c, a) in enumerate(((21.3, 40), (21.55, 25))):
        ok = r.detected[:, k] & r.fwhm[:, k].notnull()
        assert ok.mean() > 0.9
        assert 0.91 <= float((np.abs(r.center[:, k] - c) < 1.96*r.center_sigma[:, k])[ok].mean()) <= 0.98 and abs(float(r.area[:, k].mean()) - a) < 1.5


def test_failures_are_masked_and_counted_and_input_is_checked():
    da, _ = draws_of(1, n=4)
    da[0] = np.nan
    r = fit_peaks(da, [31.0], window=2.6)
    assert r.attrs["failed"] == 1 and np.isnan(r.area[0]).all() and not r.converged[0].any() and np.isfinite(r.area[1:]).all()
    for bad, words in ((dict(peaks=[50.0]), "outside"), (dict(profile="voigt"), "profile"), (dict(noise="given"), "intensity_sigma"), (dict(track="time"), "follow")):
        with pytest.raises(BattError, match=words): fit_peaks(da, **({"peaks": [31.0]} | bad))


HKL = [(0, 0, 3), (1, 0, 4), (0, 1, 5), (0, 1, 8), (1, 1, 0), (1, 1, 3)]


def test_cells_of_nmc_against_its_structures():
    """Twin patterns at other contents, wavelength, grid and seed than the notebook's."""
    xs = np.array([0.93, 0.81, 0.72, 0.63, 0.52, 0.41])
    grid = np.linspace(0, 1, 101)
    share = xr.DataArray(np.eye(101)[np.round(xs*100).astype(int)], dims=("time", "lithium_content"), coords={"time": 600.0*np.arange(6), "lithium_content": grid})
    patterns = count(xrd.powder(share, "NMC811", 0.41, np.arange(3.0, 19.0, 0.0065), exposure=30.0), seed=77)
    start = 2*np.degrees(np.arcsin(0.205/spacing((2.868, 2.868, 14.23, 90, 90, 120), HKL)))
    cell = lattice(fit_peaks(patterns, start, track="time", window=0.28), HKL, "hexagonal", 0.41)
    truth = np.array([structures.nmc(round(x*100)/100).cell for x in xs])
    for name, t in (("a", truth[:, 0]), ("c", truth[:, 2])):
        assert np.abs(cell[name]/t - 1).max() < 1e-4
        assert (np.abs(cell[name] - t) < 3.5*cell[f"{name}_sigma"]).all()


def test_displacement_in_reflection_is_found_back():
    hkl, t0 = [(1, 1, 1), (2, 0, 0), (2, 2, 0), (3, 1, 1), (4, 0, 0), (4, 2, 2), (5, 1, 1)], None
    t0 = 2*np.degrees(np.arcsin(1.540598/2/spacing((5.94,)*3 + (90,)*3, hkl)))
    read = t0 - 2*np.degrees(np.cos(np.radians(t0)/2))*(-0.8/200)
    noise = np.random.default_rng(5).normal(0, 0.004, (3000, 7))
    da = xr.DataArray(read + noise, dims=("draw", "peak"))
    r = lattice(da, hkl, "cubic", 1.540598, sigma=xr.full_like(da, 0.004), displacement="reflection", radius=200.0)
    assert 0.94 < float((np.abs(r.a - 5.94) < 1.96*r.a_sigma).mean()) < 0.96 and float(r.displacement.mean()) == pytest.approx(-0.8, abs=0.01)
    assert 0.93 < float((np.abs(r.displacement + 0.8) < 1.96*r.displacement_sigma).mean()) < 0.97
    with pytest.raises(BattError, match="cannot give"): lattice(da[:, :2], hkl[:2], "cubic", 1.54, zero=True, displacement="reflection")


@needs_data
def test_the_real_temperature_series_has_one_cell_and_a_moving_sample():
    fcc, off = [(1, 1, 1), (2, 0, 0), (2, 2, 0), (3, 1, 1), (4, 0, 0), (3, 3, 1), (4, 2, 2), (5, 1, 1)], {400: 0.55, 500: 0.0, 600: 0.4, 700: 0.0}
    plain, mended, rest = [], [], []
    for t, o in off.items():
        x, y = np.loadtxt(DATA/f"xrd/temperature-series/{t}deg.xy").T
        da = xr.DataArray(y, dims="two_theta", coords={"two_theta": x}, attrs={"units": "counts"})
        at = 2*np.degrees(np.arcsin(1.540598/2/spacing((5.935,)*3 + (90,)*3, fcc))) + o
        r = fit_peaks(da, at, alpha2=CU_ALPHA2, window=1.6)
        assert r.detected.all()
        plain.append(float(lattice(r, fcc, "cubic", 1.540598, scale=True).a))
        c = lattice(r, fcc, "cubic", 1.540598, displacement="reflection", scale=True)
        mended.append(float(c.a)); rest.append(float(np.sqrt((c.residual**2).mean())))
    assert np.ptp(plain) > 0.05 and np.ptp(mended) < 0.006 and max(rest) < 0.012 # Å, Å, deg


def two_phases(wavelength, axis, seed, n=6, **options):
    truth, share = np.linspace(0, 1, n), np.zeros((n, 101))
    share[:, 3], share[:, 96] = 1 - truth, truth
    da = xr.DataArray(share, dims=("time", "lithium_content"), coords={"time": np.arange(n)*1.0, "lithium_content": np.linspace(0, 1, 101)})
    return count(xrd.powder(da, "LFP", wavelength, axis, **options), seed=seed), truth


def ends(wavelength, top, polarization, **options):
    out = {}
    for name, x in (("FePO4", 0.03), ("LiFePO4", 0.96)):
        r = structures.reflections(structures.lithium_iron_phosphate(x), wavelength, top, polarization)
        out[name] = line_pattern(r.two_theta.values, r.intensity.values, **options)
    return out


@pytest.mark.parametrize("case", ["synchrotron", "copper"])
def test_phase_fractions_at_two_wavelengths(case):
    if case == "synchrotron": series, truth = two_phases(0.5, np.arange(4.5, 16.0, 0.011), 31, exposure=20.0); phases = ends(0.5, 16.5, 0.0); kw = dict(width=(0.02, 0.15))
    else:
        lab = xrd.Instrument("lab", flux=2e8, acceptance=0.06, caglioti=(4e-3, -4e-3, 4e-3), alpha2=(1.54443, 0.5))
        series, truth = two_phases(1.5406, np.arange(15.5, 58.0, 0.022), 32, exposure=600.0, instrument=lab, sample=xrd.Sample(loading=2.0))
        phases, kw = ends(1.5406, 60.0, 1.0, alpha2=CU_ALPHA2), dict(width=(0.03, 0.4))
    r = fit_phases(series, phases, **kw)
    error = r.fraction.sel(phase="LiFePO4").values - truth
    assert r.attrs["failed"] == 0 and np.abs(error).max() < {"synchrotron": 0.006, "copper": 0.006}[case], error
    assert (np.abs(error) < 4*r.fraction_sigma.sel(phase="LiFePO4").values).all()
    np.testing.assert_allclose(r.fraction.sum("phase"), 1.0, atol=1e-12)
    assert r.attrs["growth"] > 0.3 # the twin's widths grow with the angle
    lazy = fit_phases(series.chunk(time=4), phases, **kw)
    assert lazy.fraction.chunks is not None
    np.testing.assert_allclose(lazy.fraction.values, r.fraction.values, atol=1e-6)


def test_sigma_of_fractions_where_the_model_is_right():
    phases, x = ends(0.5, 15.0, 0.0), np.arange(5.0, 13.0, 0.015)
    a, b = (phases[n](x + 0.008, 0.06, 0.3)/max(phases[n].intensity) for n in phases)
    clean = 6*a + 3*b + 25
    weight = np.array([6/max(phases["FePO4"].intensity), 3/max(phases["LiFePO4"].intensity)])
    da = xr.DataArray(np.random.default_rng(12).poisson(clean, (300, len(x))).astype(float), dims=("draw", "two_theta"), coords={"two_theta": x}, attrs={"units": "counts"})
    r = fit_phases(da, phases, width=(0.02, 0.2), scale=False)
    z = (r.fraction.sel(phase="FePO4") - weight[0]/weight.sum())/r.fraction_sigma.sel(phase="FePO4")
    assert 0.92 <= float((np.abs(z) < 1.96).mean()) <= 0.98 and abs(float(r.zero.mean()) + 0.008) < 5e-4
    assert 0.92 <= float((np.abs(r.zero + 0.008) < 1.96*r.zero_sigma).mean()) <= 0.98 and abs(float(r.reduced_chi2.mean()) - 1) < 0.03
