"""Normalization, references, energy axis and corrections of absorption spectra against Larch's values and known truth."""
import numpy as np
import pytest
import xarray as xr

from batt_nb.campaign.absorption import read_athena, read_xdi
from batt_nb.cleaning.xas import fit_ranges, normalize_mback, normalize_short, normalize_xas, search_e0, weights
from batt_nb.cleaning.xas_corrections import correct_leakage, correct_self_absorption, find_leakage, remove_glitches
from batt_nb.cleaning.xas_energy import align_energy, edge_measure, lithium_from_edge
from batt_nb.cleaning.xas_references import fit_references, oxidation_state
from batt_nb.core import BattError, flags, history
from batt_nb.twin.xanes import COATING, edge_grid, fluorescence, normalized, transmission, xanes_map
from batt_nb.twin.xanes_artefacts import beam_decay, counting_noise, energy_drift, glitches, self_absorption, thickness_effect
from conftest import DATA, needs_data, oracle


def shares(mean, material="NMC811", width=0.03):
    x = np.linspace(0, 1, 101)
    w = np.exp(-0.5*((x - np.asarray(mean, float)[:, None])/width)**2)
    return xr.DataArray(w/w.sum(1, keepdims=True), {"time": np.arange(len(w))*1800.0, "lithium_content": x}, ("time", "lithium_content"), attrs={"material": material, "start_time": "2026-03-18T14:05:00"})


def larch_spectrum(source):
    path, _, record = source.partition("::")
    if path.endswith(".xdi"): return read_xdi(DATA/path).mu.squeeze(drop=True)
    if path.endswith(".prj"): return read_athena(DATA/path, record=0 if record == "NiO.000" else record).mu.squeeze(drop=True)
    return None


def random_map(n, seed=1):
    "Spectra of NMC811 with random steps, line backgrounds and noise; their lithium content and step."
    rng, e = np.random.default_rng(seed), edge_grid("Ni")
    table = normalized(np.linspace(0, 1, 51), e, "NMC811").values
    state, height = rng.integers(0, 51, n), 0.5 + rng.random(n)
    mu = 1 - 1e-4*(e - 8333) + height[:, None]*table[state] + 0.004*rng.standard_normal((n, e.size))
    return xr.DataArray(mu.astype("float32"), {"energy": e}, ("pixel", "energy")), state/50, height


@pytest.fixture(scope="module")
def cell(): return transmission(shares([0.9, 0.6, 0.3]))


LIMITS = (8345.0, (-150, -30), (60, 600), 2)


@needs_data
@pytest.mark.parametrize("kind, limit", [("float64", 1e-7), ("float32", 2e-5)])
def test_larch_normalization_and_e0(kind, limit):
    seen = 0
    for s in oracle("xanes")["spectra"]:
        mu, p = larch_spectrum(s["source"]), s["parameters"]
        if mu is None: continue
        d = normalize_xas(mu.astype(kind), p["e0"], (p["pre1"], p["pre2"]), (p["norm1"], p["norm2"]), p["nnorm"], nvict=p["nvict"])
        for name in ("norm", "flat"): assert np.abs(d[name].values[s["sample_index"]].astype(float) - s[name]).max() < limit
        assert abs(float(d.edge_step)/s["edge_step"] - 1) < limit
        assert abs(float(normalize_xas(mu.astype(kind), significance=0).e0) - s["find_e0_eV"]) < 1e-3
        seen += 1
    assert seen >= 12


@needs_data
def test_larch_mback():
    for s in (s for s in oracle("xanes")["spectra"] if s.get("mback_norm") and s["source"].endswith(".xdi")):
        p = s["parameters"]
        d = normalize_mback(larch_spectrum(s["source"]), s["element_edge"].split()[0], "K", p["e0"], (p["pre1"], p["pre2"]), (p["norm1"], p["norm2"]), p["nnorm"], nvict=p["nvict"])
        assert abs(float(d.edge_step)/s["mback_norm"]["edge_step_mback"] - 1) < 1e-7


def test_rows_agree_with_polyfit(cell):
    e, mu = cell.energy.values, cell.mu.values[1]
    r = fit_ranges(e, *LIMITS)
    line = np.polyfit(e[r["pre"]] - 8345, mu[r["pre"]], 1)
    rest = mu - np.polyval(line, e - 8345)
    curve = np.polyfit((e[r["post"]] - 8345)/100, rest[r["post"]], 2)
    step = np.polyval(curve, (e[r["i0"]] - 8345)/100)
    assert abs(weights(e, r)["step"] @ mu - step) < 1e-10
    d = normalize_xas(cell.mu, *LIMITS)
    assert np.allclose(d.norm[1], rest/step, atol=1e-10)
    assert history(d)[-1]["function"] == "cleaning.xas.normalize_xas" and d.e0.attrs["units"] == "eV"


def test_map_with_search_is_that_of_single_spectra():
    mu, _, height = random_map(400)
    before = mu.copy(deep=True)
    d = normalize_xas(mu)
    xr.testing.assert_identical(mu, before)
    for k in (0, 133, 399):
        one = normalize_xas(mu[k].astype(float))
        assert float(one.e0) == float(d.e0[k]) and np.allclose(one.flat, d.flat[k], atol=2e-5)
    ratio = (d.edge_step/height).values
    assert d.attrs["masked"] == 0 and ratio.std() < 0.012 and np.isin(d.e0.values, mu.energy.values).all()


def test_chunked_search_is_lazy_and_equal():
    mu, _, _ = random_map(300)
    lazy = normalize_xas(mu.chunk(pixel=70))
    assert all(lazy[k].chunks is not None for k in ("norm", "flat", "e0", "edge_step", "status"))
    plain, done = normalize_xas(mu), lazy.compute()
    for k in ("norm", "flat", "e0", "edge_step", "edge_step_sigma"): np.testing.assert_allclose(done[k], plain[k], rtol=1e-4, atol=1e-5)


def test_sigma_of_the_step(cell):
    noisy = counting_noise(cell.isel(time=np.zeros(1500, int)).assign_coords(time=np.arange(1500.0)), seed=5, electronic=0.0)
    true = float(normalize_xas(cell.mu[0], *LIMITS).edge_step)
    for d, truth in ((normalize_xas(noisy.mu, *LIMITS), true), (normalize_short(noisy.mu, (8180, 8310), (8700, 8900), exponent=0), None)):
        error = d.edge_step - (float(d.edge_step.mean()) if truth is None else truth)
        if truth is not None: assert 0.93 < float((abs(error) < 1.96*d.edge_step_sigma).mean()) < 0.97
        assert np.isfinite(d.edge_step_sigma).all()


def test_spectra_without_an_edge_are_masked_and_counted(cell):
    rng, e = np.random.default_rng(5), cell.energy.values
    bad = np.stack([cell.mu.values[0], rng.normal(0, 0.01, e.size), 2*(8333/e)**2.8, 2 - cell.mu.values[0], np.full(e.size, np.nan)])
    for e0 in (8345.0, None):
        d = normalize_xas(xr.DataArray(bad, {"energy": e}, ("frame", "energy")), e0, (-150, -30), (60, 600), 2)
        assert d.attrs["masked"] == 4 and int(d.status[0]) == 0 and (d.status[1:] > 0).all()
        for k in ("norm", "flat", "edge_step", "edge_step_sigma", "e0"): assert np.isnan(d[k][1:]).all() and np.isfinite(d[k][0]).all()
        assert sum(int(f.split()[0]) for f in flags(d)) == 4


def test_noise_alone_gives_almost_no_edges():
    noise = xr.DataArray(np.random.default_rng(2).normal(1, 0.01, (3000, 400)), {"energy": edge_grid("Ni")}, ("pixel", "energy"))
    assert normalize_xas(noise).attrs["masked"] >= 2995


def test_missing_readings_are_left_out(cell):
    holes = cell.mu.copy(deep=True); holes[1, [100, 200, -1]] = np.nan
    keep, d = np.isfinite(holes.values[1]), normalize_xas(holes, *LIMITS)
    np.testing.assert_array_equal(d.norm[1].values[keep], normalize_xas(cell.mu[1][keep], *LIMITS).norm)
    assert np.isnan(d.norm[1].values[~keep]).all() and np.isfinite(d.norm[0]).all()


@pytest.mark.parametrize("how, words", [({"pre": (-900, -400), "e0": 8345.0}, "the spectra begin"), ({"pre": (-30, -150)}, "pre runs from"), ({"e0": 7112.0}, "not inside"), ({"post": (-20, 300)}, "before the edge"), ({"order": 9}, "order")])
def test_bad_ranges_are_refused(cell, how, words):
    with pytest.raises(BattError, match=words): normalize_xas(cell.mu, **how)


def test_unsorted_energies_are_refused(cell):
    for f in (lambda m: normalize_xas(m), lambda m: edge_measure(m, (8330, 8360)), lambda m: correct_self_absorption(m, "LiNiO2", "Ni")):
        with pytest.raises(BattError, match="do not increase"): f(cell.mu[:, ::-1])


def test_search_e0_finds_steps():
    import torch
    e = edge_grid("Ni")
    for at in (8335.2, 8345.6, 8360.0):
        rise = np.arctan((e - at)/1.5)/np.pi + 0.5
        assert abs(e[int(search_e0(torch.as_tensor(rise[None]), e)[0])] - at) <= 0.42
    spike = np.arctan((e - 8345.6)/1.5)/np.pi + 0.5; spike[300] += 5
    assert abs(e[int(search_e0(torch.as_tensor(spike[None]), e)[0])] - 8345.6) <= 0.42


def test_short_range_map():
    c = (np.arange(24) - 11.5)*0.18
    r = np.hypot(*np.meshgrid(c, c, indexing="ij"))
    depth = xr.DataArray(2.4*np.sqrt(np.maximum(1 - (r/2)**2, 0)), {"y": c, "x": c}, ("y", "x"))
    lithium = xr.DataArray(np.where(r < 1.95, 0.98, np.nan), {"y": c, "x": c}, ("y", "x"), attrs={"material": "LFP"})
    few = 7112 + np.concatenate([np.arange(-40, -4, 5.0), np.arange(2, 24, 1.8), [39.5, 42.0, 44.5]])
    stack, level = xanes_map(lithium, depth, few, dtype="float64"), normalized([1.0], few, "LFP").rename(lithium_content="reference").drop_vars("reference")
    d = normalize_short(stack, (7070, 7110), (7150, 7158), level=level)
    truth = normalized([0.98], few, "LFP")[0]
    inside = depth > 0.5
    assert abs(d.norm - truth).where(inside).max() < 0.03 and (d.status.values[depth.values == 0] != 0).all()
    lazy = normalize_short(stack.chunk(y=6), (7070, 7110), (7150, 7158), level=level)
    np.testing.assert_allclose(lazy.edge_step.compute(), d.edge_step)
    with pytest.raises(BattError, match="overlap"): normalize_short(stack, (7070, 7152), (7150, 7158))


@needs_data
def test_larch_linear_combination():
    from scipy.interpolate import CubicSpline
    read = lambda name: np.loadtxt(DATA/f"xas/lcf-example/{name}.dat", unpack=True)
    e, y = read("unknown")
    for fit in oracle("xanes")["lincombo"]["exact_constrained"]["fits"]:
        standards = xr.DataArray([CubicSpline(*read(c))(e) for c in fit["components"]], {"energy": e, "reference": fit["components"]}, ("reference", "energy"))
        lo, hi = fit["energy_first_last"]
        found = fit_references(xr.DataArray(y, {"energy": e}, ("energy",)), standards, window=(lo - 0.01, hi + 0.01), sum_to_one=fit["sum_to_one"])
        for name, w in fit["weights"].items(): assert abs(float(found.weight.sel(reference=name)) - w) < 1e-6


@pytest.fixture(scope="module")
def two_phases():
    e, rng = np.arange(7100.0, 7180, 0.4), np.random.default_rng(9)
    pure = normalized([1.0, 0.0], e, "LFP").rename(lithium_content="reference").assign_coords(reference=["LiFePO4", "FePO4"])
    w = np.stack([np.linspace(0, 1.2, 2000), np.linspace(1.0, 0, 2000)], 1)
    return pure, w, xr.DataArray(w @ pure.values + rng.normal(0, 0.01, (2000, e.size)), {"energy": e}, ("pixel", "energy"))


@pytest.mark.parametrize("how", [{}, {"sigma": 0.01}, {"background": 1}, {"shift": 0.4}])
def test_sigma_of_the_weights(two_phases, how):
    pure, w, y = two_phases
    if "shift" in how: pure, y = pure, y.sel(energy=slice(7102, 7178))
    f = fit_references(y, pure, **how)
    free = (w > 0.05).all(1)
    pull = ((f.weight - w)/f.weight_sigma).values[free]
    assert 0.93 < np.mean(abs(pull) < 1.96) < 0.97 and (f.weight >= 0).all() and abs(pull.mean()) < 0.15
    assert np.allclose(f.share.sum("reference"), 1)


def test_references_sum_to_one_and_dask(two_phases):
    pure, _, y = two_phases
    f = fit_references(y, pure, sum_to_one=True)
    assert np.allclose(f.weight.sum("reference"), 1, atol=1e-9)
    lazy = fit_references(y.chunk(pixel=600), pure, sum_to_one=True)
    assert lazy.weight.chunks is not None
    np.testing.assert_allclose(lazy.weight.compute(), f.weight, atol=1e-12)


def test_references_that_are_the_same_are_refused(two_phases):
    pure, _, y = two_phases
    with pytest.raises(BattError, match="told apart"): fit_references(y, xr.concat([pure, pure.mean("reference").assign_coords(reference="mean")], "reference"))


def test_oxidation_state_masks_what_is_empty(two_phases):
    pure, w, y = two_phases
    empty = y.isel(pixel=slice(0, 500))*0 + np.random.default_rng(1).normal(0, 0.01, (500, y.sizes["energy"]))
    state = oxidation_state(fit_references(xr.concat([y, empty], "pixel"), pure), {"LiFePO4": 2, "FePO4": 3})
    truth = (w*[2, 3]).sum(1)/w.sum(1)
    pull = ((state.oxidation_state[:2000] - truth)/state.oxidation_state_sigma[:2000]).values[(w > 0.05).all(1)]
    assert 0.93 < np.mean(abs(pull) < 1.96) < 0.97 and np.isnan(state.oxidation_state[2000:]).mean() > 0.99 and state.attrs["masked"] >= 495


def drifted(seed, n=25):
    clean = transmission(shares(np.linspace(0.9, 0.4, n)))
    return counting_noise(beam_decay(energy_drift(clean, seed=seed), seed=seed), seed=seed)


def test_alignment_and_its_sigma():
    pulls = []
    for seed in range(40, 45):
        ds = drifted(seed)
        a = align_energy(ds, move=False)
        off = a.foil_shift - ds.true_energy_shift      # the axis of the mean foil is free
        pulls.append(((off - off.mean())/a.foil_shift_sigma).values)
    pulls = np.concatenate(pulls)
    assert 0.85 < pulls.std() < 1.12 and 0.92 < np.mean(abs(pulls) < 1.96) < 0.98


def test_an_axis_that_does_not_drift_stays():
    ds = counting_noise(transmission(shares(np.full(20, 0.8))), seed=2)
    a = align_energy(ds)
    assert float(a.energy_shift.std()) < 1.3*float(a.energy_shift_sigma.mean()) and float(abs(a.energy_shift).max()) < 0.05
    lazy = align_energy(ds.chunk(time=6))
    assert lazy.mu.chunks is not None
    np.testing.assert_allclose(lazy.mu.compute(), a.mu, atol=1e-12)


def test_alignment_is_refused_twice():
    ds = drifted(3, 6)
    aligned = align_energy(ds)
    bare = aligned.drop_attrs(deep=False)
    for twice in (aligned, bare, bare.drop_vars(["energy_shift", "energy_shift_sigma"]).assign_attrs(history=aligned.attrs["history"]), ds.assign_attrs(foil_aligned=1), ds.assign_attrs(foil_aligned="True")):
        with pytest.raises(BattError, match="aligned already"): align_energy(twice)


def test_alignment_moves_the_spectra_back():
    clean = transmission(shares(np.linspace(0.9, 0.4, 6)))
    aligned = align_energy(energy_drift(clean, seed=4), reference=xr.DataArray(clean.foil.values, {"energy": clean.energy}, ("energy",)))
    inner = clean.energy.values[5:-5]
    assert float(abs(aligned.mu - clean.mu).sel(energy=inner).max()) < 2e-3
    np.testing.assert_allclose(aligned.energy_shift, clean.assign_coords(t=1).time*0 + energy_drift(clean, seed=4).true_energy_shift, atol=2e-3)


def test_a_scan_without_foil_is_masked():
    ds = drifted(3, 6).copy(deep=True)
    ds.foil[2] = np.nan
    ds.foil[4] = 1 + 0.01*np.random.default_rng(1).normal(size=ds.sizes["energy"])
    d = align_energy(ds)
    assert np.isnan(d.energy_shift.values).tolist() == [False, False, True, False, True, False] and np.isnan(d.mu[2]).all() and d.attrs["masked"] == 2
    assert any("2 of 6" in f for f in flags(d))


@pytest.mark.parametrize("measure", ["integral", "half", "white_line"])
def test_edge_measures(measure):
    x, e, rng = np.linspace(0.1, 0.95, 6), np.arange(8300.0, 8420, 0.4), np.random.default_rng(3)
    pure = normalized(x, e, "NMC811")
    noisy = xr.DataArray(np.repeat(pure.values[:, None], 300, 1) + rng.normal(0, 0.004, (6, 300, e.size)), {"true": ("state", x), "energy": e}, ("state", "repeat", "energy"))
    exact, found = (edge_measure(d, (8330, 8362), measure=measure, sigma=s) for d, s in ((pure, 0.0), (noisy, 0.004)))
    assert (np.diff(exact.position) < 0).all()
    pull = (found.position - exact.position.values[:, None])/found.position_sigma
    assert 0.935 < float((abs(pull) < 1.96).mean()) < 0.965
    own = edge_measure(noisy, (8330, 8362), measure=measure)
    assert abs(float(own.position_sigma.mean()/found.position_sigma.mean()) - 1) < 0.06
    lithium = lithium_from_edge(found, exact.position)
    assert float(np.sqrt(((lithium.lithium_content - noisy.true)**2).mean())) < 0.01
    np.testing.assert_allclose(edge_measure(noisy.chunk(repeat=100), (8330, 8362), measure=measure, sigma=0.004).position.compute(), found.position)
    with pytest.raises(BattError, match="already"): lithium_from_edge(exact, exact.position)


def test_a_place_outside_the_known_states_is_no_lithium_content():
    known = xr.DataArray([8345.0, 8344.0, 8343.0], {"lithium_content": [0.2, 0.5, 0.9]}, ("lithium_content",))
    at = xr.Dataset({"position": ("time", [8344.0, 8343.5, 8350.0, 8345.01]), "position_sigma": ("time", [0.01]*4)})
    d = lithium_from_edge(at, known)
    assert abs(float(d.lithium_content[0]) - 0.5) < 1e-12 and np.isnan(d.lithium_content.values).tolist() == [False, False, True, False] and d.attrs["outside"] == 1


def test_glitches_are_found_and_clean_series_untouched():
    series = transmission(shares(np.linspace(0.9, 0.4, 8)))
    clean = remove_glitches(counting_noise(series, seed=1))
    assert clean.attrs["glitches"] == 0
    np.testing.assert_array_equal(clean.mu, counting_noise(series, seed=1).mu)
    hit = deep = wrong = 0
    for seed in range(30, 38):
        d = remove_glitches(counting_noise(glitches(series, seed=seed), seed=seed))
        dip = d.true_glitch.values
        hit, deep = hit + int((d.glitch.values & (dip > 0.01)).sum()), deep + int((dip > 0.01).sum())
        wrong += int((d.glitch & (dip < 5e-4)).sum())
        assert np.isnan(d.mu.values[:, d.glitch]).all()
    assert hit > 0.9*deep and wrong < 0.01*8*400


def test_leakage_comes_back():
    scan = transmission(shares([0.9]*60), loading=10.0)
    thin = normalize_xas(transmission(shares([0.9]), loading=4.0).mu, *LIMITS).norm[0]
    seen = counting_noise(thickness_effect(scan, strength=0.04, leakage=1.0), seed=3, electronic=0.0)
    f = find_leakage(seen.mu, thin, (8310, 8420))
    pull = (f.leakage - 0.04)/f.leakage_sigma
    assert 0.85 < float(pull.std()) < 1.2 and abs(float(f.leakage.mean()) - 0.04) < 1e-3
    np.testing.assert_allclose(correct_leakage(thickness_effect(scan, strength=0.04, leakage=1.0).mu, 0.04), scan.mu, atol=1e-9)
    with pytest.raises(BattError, match="already"): correct_leakage(correct_leakage(seen.mu, 0.04), 0.04)


@pytest.mark.parametrize("loading, angles", [(3.0, (45, 45)), (20.0, (45, 45)), (20.0, (80, 10))])
def test_self_absorption(loading, angles):
    clean = fluorescence(shares([0.9, 0.5]), loading=loading, angles=angles)
    truth, seen = (normalize_xas(m, *LIMITS).norm for m in (clean.mu, self_absorption(clean).mu))
    d = correct_self_absorption(seen, "LiNi0.8Mn0.1Co0.1O2", "Ni", loading=loading, around=COATING, angles=angles, e0=8345.0)
    gap = lambda da: float(abs(da - truth).sel(energy=slice(8325, 8420)).max())
    assert gap(d.norm) < 0.2*gap(seen) and float(d.noise_gain[0].sel(energy=8352, method="nearest")) > 1.2
    with pytest.raises(BattError, match="already"): correct_self_absorption(d.norm, "LiNi0.8Mn0.1Co0.1O2", "Ni")


@needs_data
def test_stxm_map_agrees_with_its_references():
    from batt_nb.campaign.reading import read
    folder = DATA/"xas/fe-l-edge-stxm/ALS_Toner/71214078_FigS4"
    stack = read(folder/"71214078.hdr", technique="xas", i0="i0.xsp")
    pair = xr.DataArray([np.loadtxt(folder/f"{n}.t", usecols=1) for n in ("reduced", "oxidized")], {"energy": stack.energy.values, "reference": ["reduced", "oxidized"]}, ("reference", "energy"))
    fit = fit_references(stack.mu, pair, background=1)
    state = oxidation_state(fit, {"reduced": 0, "oxidized": 1}).oxidation_state
    line = np.linspace(-1, 1, stack.sizes["energy"])
    for k, side in enumerate((state < 0.15, state > 0.85)):
        assert int(side.sum()) > 300
        mean = stack.mu.where(side).sum(("y", "x")).values/float(fit.weight.sum("reference").where(side).sum())
        basis = np.stack([pair.values[k], np.ones_like(line), line], 1)
        c = np.linalg.lstsq(basis, mean, rcond=None)[0]
        assert abs(c[0] - 1) < 0.03 and (mean - basis @ c).std() < 0.03*pair.values[k].max()


@pytest.mark.slow
def test_a_hundred_thousand_spectra():
    import time
    mu, _, height = random_map(100_000)
    normalize_xas(mu[:500])
    start = time.process_time(); d = normalize_xas(mu, None, (-150, -30), (60, 600), 2); spent = time.process_time() - start
    assert d.attrs["masked"] == 0 and abs(float((d.edge_step/height).mean()) - 1) < 0.02 and spent < 100_000*60e-6
