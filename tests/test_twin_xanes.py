"""The twin's XANES: edges move by published and by measured amounts, absorption is that of the tables, artefacts keep their contract, files come back."""
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
import xraydb
from scipy.special import voigt_profile

from batt_nb.campaign.absorption import combine, edge_position, read_extranormal, read_xdi
from batt_nb.campaign.reading import read
from batt_nb.campaign.sources import materialize, resolve
from batt_nb.core import BattError, absolute_time, history
from batt_nb.twin.materials import material
from batt_nb.twin.xanes import (RESOLUTION, SITES, beam_intensity, between, continued, edge_facts, edge_grid, fluorescence, foil_absorption, foil_normalized, line_profile,
                                mass_absorption, molar_absorption, normalized, per_micrometer, site_spectrum, step_profile, transmission, xanes_map)
from batt_nb.twin.xanes_artefacts import (CHAINS, MAP_HINTS, SERIES_HINTS, add_artefacts, beam_decay, counting_noise, energy_drift, expected_counts, glitches, harmonics,
                                          image_drift, noise_variance, pixel_noise, self_absorption, thickness_effect, wander, write_map, write_xdi)
from conftest import DATA, needs_data, oracle

X = np.linspace(0, 1, 101)


def as_share(weights, name, hours=10.0):
    """Shares of a series."""
    weights = np.atleast_2d(weights)
    return xr.DataArray(weights/weights.sum(1, keepdims=True), dims=("time", "lithium_content"), coords={"time": np.linspace(0, 3600*hours, len(weights)), "lithium_content": X},
                        attrs={"material": name, "start_time": "2026-03-18T14:05:00"})


def humps(means, width=0.04): return np.exp(-0.5*((X - np.asarray(means)[:, None])/width)**2)


NMC = as_share(humps(np.linspace(0.95, 0.3, 12)), "NMC811")
HEAPS = np.linspace(0, 1, 12)[:, None]
LFP = as_share((1 - HEAPS)*humps([0.97], 0.012) + HEAPS*humps([0.03], 0.012), "LFP")


@pytest.fixture(scope="module")
def clean(): return transmission(NMC)


@pytest.fixture(scope="module")
def bright(): return fluorescence(NMC)


def half_height(energy, y, level=0.5):
    """First upward crossing."""
    k = np.flatnonzero((y[:-1] < level) & (y[1:] >= level))[0]
    return energy[k] + (level - y[k])/(y[k + 1] - y[k])*(energy[k + 1] - energy[k])


# ------------------------------------------------------------------------------------------------------------------ reference spectra
def test_profiles_are_voigt_and_its_integral():
    u = np.linspace(-40, 40, 16001)
    for gauss, lorentz in ((0.8, 1.25), (3.0, 1.44), (9.0, 1.25)):
        exact = voigt_profile(u, gauss/np.sqrt(8*np.log(2)), lorentz/2)
        assert abs(line_profile(u, gauss, lorentz) - exact).max() < 0.012*exact.max()
        assert abs(np.gradient(step_profile(u, gauss, lorentz), u) - line_profile(u, gauss, lorentz))[5:-5].max() < 1e-4*exact.max()
        assert abs(step_profile(0.0, gauss, lorentz) - 0.5) < 1e-12 and step_profile(1e6, gauss, lorentz) > 0.99999


@pytest.mark.parametrize("element, edge, life", [("Fe", 7112.0, 1.25), ("Ni", 8333.0, 1.44)])
def test_foil_is_the_ruler(element, edge, life):
    assert edge_facts(element) == (edge, life)  # Krause and Oliver 1979
    fine = np.arange(edge - 12, edge + 5, 0.01)
    for resolution in (1e-4, RESOLUTION, 2e-4):
        slope = np.gradient(foil_normalized(element, fine, resolution), fine)
        assert abs(fine[slope.argmax()] - edge) < 0.05
    broad = np.gradient(foil_normalized(element, fine, 4e-4), fine).max()
    assert broad < 0.8*slope.max()  # a worse monochromator makes a blunter edge


def test_edges_move_by_published_amounts():
    e = np.arange(7100, 7150, 0.05)
    full, empty = normalized([1, 0], e, "LFP").values
    assert abs(half_height(e, empty) - half_height(e, full) - 4.9) < 0.4  # read off the spectra distributed with Pattammattel et al., Sci. Adv. 6, eabb3615 (2020)
    assert abs(e[empty.argmax()] - e[full.argmax()] - 4.9) < 0.4
    low = e < 7116.5
    assert abs(e[low][np.diff(full[low], append=9).argmin()] - 7113.0) < 1.0  # pre-edge of Fe(2+), Wilke et al. 2001 on this scale
    centers = [np.average([p[0] for p in SITES[s].peaks[:2]], weights=[p[1] for p in SITES[s].peaks[:2]]) for s in ("LiFePO4", "FePO4")]
    assert abs(centers[1] - centers[0] - 1.4) < 0.3


def test_two_phases_are_linear_and_a_solid_solution_slides():
    e = np.arange(8330, 8365, 0.05)
    ends, middle = normalized([0, 1], np.arange(7100, 7200, 0.5), "LFP").values, normalized([0.3], np.arange(7100, 7200, 0.5), "LFP").values[0]
    np.testing.assert_allclose(middle, 0.7*ends[0] + 0.3*ends[1], atol=1e-14)
    slide = normalized(np.linspace(0, 1, 21), e, "NMC811").values
    for level in (0.2, 0.4, 0.5, 0.8): assert (np.diff([half_height(e, y, level) for y in slide]) < -1e-3).all()
    assert abs(slide[10] - 0.5*(slide[0] + slide[-1])).max() > 0.05
    site = between(SITES["NMC811, x = 0"], SITES["NMC811, x = 1"], 0.5)
    np.testing.assert_allclose(site_spectrum(site, "Ni", e), slide[10], atol=1e-14)


@needs_data
def test_iron_beside_measured_spectra():
    library = read_xdi(DATA/"xas/fe-l-edge-stxm/HXN_XANES/FeLibNov2021.nor").swap_dims(frame="record").norm
    e = library.energy.values
    for record, x in (("LiFe(II)PO4", 1), ("Fe(III)PO4", 0)):
        measured, twin = library.sel(record=record).values, normalized([x], e, "LFP").values[0]
        twin = twin - np.polyval(np.polyfit(e[e < 7104], twin[e < 7104], 1), e)
        assert abs(half_height(e, measured) - half_height(e, twin)) < 0.5 and abs(e[measured.argmax()] - e[twin.argmax()]) < 0.8
        assert abs(measured.max() - twin.max()) < 0.06 and np.std(measured - twin) < 0.05
        assert np.std(measured - twin) > 0.01  # a likeness, not a copy


@needs_data
def test_nickel_beside_the_measured_charge():
    want = {s["index_in_time_order"]: s for s in oracle("operando_alignment")["result"]["samples"]}
    shift, charge = want[51]["edge_eV_at_mu_0.5"] - want[0]["edge_eV_at_mu_0.5"], want[51]["white_line_grid_eV"] - want[0]["white_line_grid_eV"]
    e = np.arange(8335, 8365, 0.02)
    full, empty = normalized([1.0, 0.25], e, "NMC811").values
    scale = 0.75*1.25/0.8  # change of the nickel's charge, NMC811 from x = 1 to 0.25 over LiNiO2 up to 4.2 V
    assert abs(half_height(e, empty) - half_height(e, full) - scale*shift) < 0.4 and abs(e[empty.argmax()] - e[full.argmax()] - scale*charge) < 0.6
    sources = resolve(["*op2*.tar.xz::*.txt"], DATA/"campaigns/lno-operando-xas/raw/xas")
    with materialize(sources[:1] + sources[-1:]) as paths: lno = combine([read_extranormal(p) for p in paths])
    for measured, x in zip(lno.norm, (1.0, 0.25)):
        near = (lno.energy.values > 8320) & (lno.energy.values < 8700)
        assert 0.005 < np.std(measured.values[near] - normalized([x], lno.energy.values[near], "NMC811").values[0]) < 0.06


def test_grid_is_that_of_a_monochromator():
    for element in ("Fe", "Ni"):
        e, e0 = edge_grid(element), edge_facts(element)[0]
        assert (np.diff(e) > 0).all() and e[0] == e0 - 160 and 600 < e[-1] - e0 < 620
        near = e[(e > e0 - 20) & (e < e0 + 50)]
        angle = np.degrees(np.arcsin(12398.419843/(2*3.13556*near)))
        np.testing.assert_allclose(np.diff(angle), -7e-4, rtol=0.05)
        assert not np.allclose(np.diff(near), np.diff(near)[0], atol=1e-6)


# --------------------------------------------------------------------------------------------------------------------- absorption
@pytest.mark.parametrize("element", ["Fe", "Ni"])
def test_continued_absorption_is_the_table(element):
    e0 = edge_facts(element)[0]
    e = e0 + np.array([-300.0, -50, -5, 5, 50, 500])
    low, high = continued(element, e)
    np.testing.assert_allclose(low[:3], xraydb.mu_elam(element, e[:3])); np.testing.assert_allclose(high[3:], xraydb.mu_elam(element, e[3:]))
    assert (np.diff(np.log(low)) < 0).all() and (np.diff(np.log(high)) < 0).all()
    np.testing.assert_allclose((high/low)[2:4], 7.7, atol=0.35)


def test_compounds_by_elements():
    e = np.array([7000.0, 9000.0])
    np.testing.assert_allclose(mass_absorption("C22H10N2O5", e)*1.42, xraydb.material_mu("C22H10N2O5", e, density=1.42), rtol=1e-9)
    parts, m = molar_absorption("LFP", e), material("LFP")
    whole = (parts["lithium"] + parts["host"] + np.array([0, 1])*parts["jump"])/m.molar_mass
    np.testing.assert_allclose(whole*m.density[1], xraydb.material_mu("LiFePO4", e, density=m.density[1]), rtol=2e-4)


@pytest.mark.parametrize("share", [LFP, NMC], ids=["LFP", "NMC811"])
def test_edge_jump_is_that_of_the_loading(share):
    m = material(share.material)
    for loading in (2.0, 8.0):
        ds = transmission(share, loading=loading)
        e, e0 = ds.energy.values, ds.e0
        atoms = xraydb.chemparse(m.weighed)
        want = 1e-3*loading*atoms[m.edge]*xraydb.atomic_mass(m.edge)/m.molar_mass*float(np.diff(xraydb.mu_elam(m.edge, e0 + np.array([-.5, .5])))[0])
        for y in ds.mu.values[[0, 6, -1]]:
            pre, post = e < e0 - 30, e > e0 + 100
            height = y[post] - np.polyval(np.polyfit(e[pre]**-3.0, y[pre], 1), e[post]**-3.0)
            assert abs(np.average(height*(e[post]/e0)**2.75, weights=np.gradient(e[post]))/want - 1) < 0.01


def test_clean_share_comes_back():
    ends = transmission(as_share(np.eye(101)[[100, 0]], "LFP")).mu.values
    ds = transmission(LFP)
    found = np.linalg.lstsq(ends.T, ds.mu.values.T, rcond=None)[0][0]
    assert abs(found - ds.true_lithium_content.values).max() < 1e-6
    np.testing.assert_allclose(ds.true_lithium_content.values, (LFP.values @ X))


def test_layers_add():
    bare, whole = transmission(NMC, coating={}, windows={}), transmission(NMC, coating={}, windows={"Al": 4.05})
    np.testing.assert_allclose((whole.mu - bare.mu).values[0], 4.05e-3*xraydb.mu_elam("Al", bare.energy.values), rtol=1e-9)
    np.testing.assert_allclose(transmission(NMC, loading=4.0, windows={}).mu, transmission(NMC, loading=8.0, windows={}).mu/2, rtol=1e-12)
    foil, twice = (transmission(NMC, foil_um=t).foil.values for t in (5.0, 10.0))
    np.testing.assert_allclose(twice, 2*foil); np.testing.assert_allclose(foil, foil_absorption("Ni", bare.energy.values, 5.0))
    post = bare.energy.values > 8800
    np.testing.assert_allclose(foil[post], 5e-4*8.908*xraydb.mu_elam("Ni", bare.energy.values[post]), rtol=0.02)
    assert abs(beam_intensity("Ni", [8333.0], 2e6)[0] - 2e6) < 1e-6


def test_outputs_say_what_they_are(clean):
    assert clean.mu.dims == ("time", "energy") and clean.foil.dims == clean.i0.dims == ("energy",)
    assert clean.energy.units == "eV" and clean.mu.long_name and clean.start_time == "2026-03-18T14:05:00" and (clean.element, clean.edge) == ("Ni", "K")
    assert [h["function"] for h in history(clean)] == ["twin.xanes.transmission"]
    cells = xr.concat([NMC, NMC], "cell")
    np.testing.assert_array_equal(transmission(cells).mu.values[1], clean.mu.values)
    assert transmission(NMC[0].drop_vars("time")).mu.dims == ("energy",)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(BattError, match="no absorption edge"): transmission(NMC, "graphite")
    with pytest.raises(BattError, match="sum to 0.5"): transmission(0.5*NMC, "NMC811")
    with pytest.raises(BattError, match="do not say which material"): transmission(NMC.drop_attrs())
    with pytest.raises(BattError, match="between 0 and 1"): normalized([-0.1], [8333.0], "NMC811")
    with pytest.raises(BattError, match="NaN"): transmission(NMC.where(NMC.lithium_content > 0.1), "NMC811")


def test_fluorescence_by_hand(bright):
    m, e = material("NMC811"), bright.energy.values
    hole = 8e-3/m.molar_mass*0.8*xraydb.atomic_mass("Ni")*np.subtract(*continued("Ni", e)[::-1])*(NMC.values @ normalized(X, e, "NMC811").values)
    gain = xraydb.fluor_yield("Ni", "K", "Ka", 8433.0)[0]*0.01/np.sin(np.pi/4)
    scatter = bright.mu.values - gain*hole
    np.testing.assert_allclose(scatter, scatter[0, 0], rtol=1e-9); assert 0 < scatter[0, 0] < 0.05*gain*hole.max()
    # thick and thin limits of Iida and Noma (1993)
    a = bright.mu_total/np.sin(np.pi/4) + bright.mu_escape/np.sin(np.pi/4)
    np.testing.assert_allclose(self_absorption(bright).mu, (bright.mu*(1 - np.exp(-a))/a), rtol=1e-10)
    np.testing.assert_allclose(self_absorption(bright, strength=200).mu, bright.mu/(200*a), rtol=1e-9)
    thin = fluorescence(NMC, loading=1e-4)
    np.testing.assert_allclose(self_absorption(thin).mu, thin.mu, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------------------- maps
def lithium_map(n=24, name="LFP"):
    """A particle with two kinds of lithium, and its thickness."""
    c = (np.arange(n) - (n - 1)/2)*0.1
    r = np.hypot(*np.meshgrid(c, c, indexing="ij"))
    x = np.where(r < 0.9, np.where(c > 0, 0.9, 0.1) if name == "LFP" else 0.3 + 0.5*r, np.nan)
    make = lambda v: xr.DataArray(v, dims=("y", "x"), coords={"y": c, "x": c}, attrs={"material": name, "start_time": "2026-03-18T14:05:00"})
    return make(x), make(np.where(r < 0.9, 2.0 - r, 0.0))


@pytest.mark.parametrize("name", ["LFP", "NMC811"])
def test_map_is_the_bulk_in_each_pixel(name):
    x, t = lithium_map(name=name)
    e = edge_grid(material(name).edge)[20:200:12]
    stack = xanes_map(x, t, e, dtype="float64")
    assert stack.dims == ("energy", "y", "x") and float(abs(stack.where(x.isnull(), 0)).max()) == 0
    m = material(name)
    for i, j in ((12, 6), (12, 17), (8, 12)):
        here = float(x[i, j])
        moles = 1e-4*float(t[i, j])*m.density_at(here)/(m.molar_mass - (1 - here)*xraydb.atomic_mass("Li"))
        share = as_share((1 - 100*abs(X - here)).clip(0), name)  # between two points of its grid
        bulk = transmission(share, loading=1e3*moles*m.molar_mass, coating={}, windows={}, energies=e)
        np.testing.assert_allclose(stack[:, i, j], bulk.mu[0], rtol=2e-3)
    np.testing.assert_allclose(per_micrometer(name, e)[200], 1e-4*m.density[1]/m.molar_mass*(sum(molar_absorption(name, e)[k] for k in ("lithium", "host"))
                               + molar_absorption(name, e)["jump"]*normalized([1], e, name).values[0]))
    series = xr.concat([x, 1 - x], "time").assign_coords(time=[0.0, 60.0])
    np.testing.assert_array_equal(xanes_map(series, t, e, name, dtype="float64")[0], stack)
    with pytest.raises(BattError, match="one grid"): xanes_map(x, t[1:], e)
    with pytest.raises(BattError, match="between 0 and 1"): xanes_map(x + 1, t, e, name)


# ---------------------------------------------------------------------------------------------------------------------- artefacts
def values(data): return [data[v] for v in ("mu", "foil", "i0")] if isinstance(data, xr.Dataset) else [data]


def stack_of():
    x, t = lithium_map()
    return xanes_map(xr.concat([x, 1 - x], "time").assign_coords(time=[0.0, 900.0]).assign_attrs(x.attrs), t, np.arange(7105.0, 7145.0, 4))


@pytest.mark.parametrize("f", [*dict.fromkeys(f for c in CHAINS.values() for f in c), add_artefacts, image_drift, pixel_noise], ids=lambda f: f.__name__)
def test_contract_of_every_artefact(f, clean, bright):
    data = stack_of() if f in (image_drift, pixel_noise) else bright if f is self_absorption else clean
    before = data.copy(deep=True)
    for got, want in zip(values(f(data, strength=0, seed=3)), values(data)):
        assert got.dtype == want.dtype and np.array_equal(got.values, want.broadcast_like(got).transpose(*got.dims).values)
    one, again, other = f(data, seed=3), f(data, seed=3), f(data, seed=4)
    assert one.identical(again) and data.identical(before)
    random = f not in (harmonics, thickness_effect, self_absorption)
    assert one.equals(other) != random
    assert values(one)[0].dims == values(data)[0].dims and dict(one.sizes) == dict(data.sizes) and np.array_equal(one.energy, data.energy)
    change = [max(float(abs(a - b).max()) for a, b in zip(values(f(data, strength=s, seed=3)), values(data))) for s in (1e-5, 0.3, 1, 2)]
    assert change[0] < 1e-3*max(change[2], 1) and change == sorted(change)
    with pytest.raises(BattError, match="strength"): f(data, strength=-1)


def test_strength_scales_and_never_redraws(clean):
    one, two = (counting_noise(clean, strength=s, seed=5).i0 - clean.i0 for s in (1.0, 2.0))
    np.testing.assert_allclose(two, 2*one, rtol=1e-6, atol=1e-6)
    one, two = (energy_drift(clean, strength=s, seed=5).true_energy_shift for s in (1.0, 2.0))
    np.testing.assert_allclose(two, 2*one); np.testing.assert_allclose(*(glitches(clean, strength=s, seed=5).true_glitch/s for s in (1.0, 3.0)))


def test_energy_drift_is_what_it_says(clean):
    ds = energy_drift(clean, seed=2, offset=0.4)
    for i in (0, 7):
        exact = transmission(NMC[i:i + 1], energies=clean.energy.values - float(ds.true_energy_shift[i]))
        assert abs(ds.mu[i] - exact.mu[0].values).max() < 3e-4 and abs(ds.foil[i] - exact.foil.values).max() < 6e-4
    middle = 0.5*float(clean.foil.max())
    moved = edge_position(ds.foil, middle, (8320, 8360)).values - float(edge_position(clean.foil.expand_dims("time"), middle, (8320, 8360))[0])
    np.testing.assert_allclose(moved, ds.true_energy_shift, atol=0.01)
    t = np.linspace(0, 4e6, 20001)
    assert abs(wander(t, 1, "a").std() - 1) < 0.05 and abs(wander(t, 1, "a").mean()) < 0.05
    np.testing.assert_array_equal(wander(t[5:9], 1, "a"), wander(t, 1, "a")[5:9])


def test_intensities_add(clean):
    h, p = 0.004, 0.03
    ds = thickness_effect(harmonics(clean, fraction=h), leakage=p)
    want = -np.log((1 - p)*(np.exp(-clean.mu) + h*np.exp(-clean.mu_harmonic))/(1 + h) + p)
    np.testing.assert_allclose(ds.mu, want, rtol=1e-12)
    i_t, i_r = np.exp(-clean.mu) + h*np.exp(-clean.mu_harmonic), np.exp(-clean.mu - clean.foil) + h*np.exp(-clean.mu_harmonic - clean.foil_harmonic)
    np.testing.assert_allclose(ds.foil, np.log(i_t/i_r), rtol=1e-12)
    bare, atoms = transmission(NMC, coating={}, windows={}), {"Li": float(clean.true_lithium_content.mean()), "Ni": 0.8, "Mn": 0.1, "Co": 0.1, "O": 2}
    third = 8e-3/material("NMC811").molar_mass*sum(n*xraydb.atomic_mass(el)*xraydb.mu_elam(el, 3*bare.energy.values) for el, n in atoms.items())
    np.testing.assert_allclose(bare.mu_harmonic, third, rtol=1e-9); assert (clean.mu_harmonic > bare.mu_harmonic).all() and float(clean.mu_harmonic.max()) < 0.2
    assert (ds.true_harmonic_fraction, ds.true_leakage) == (h, p)


@pytest.mark.parametrize("kind", ["transmission", "fluorescence"])
def test_noise_law(kind, clean, bright):
    one = (clean if kind == "transmission" else bright).isel(time=0, energy=slice(10, None, 9))
    many = one.expand_dims(time=np.arange(2000.0)).transpose("time", "energy") if kind == "transmission" else one.drop_vars(["mu", "mu_total"]).assign(
        {v: one[v].expand_dims(time=np.arange(2000.0)) for v in ("mu", "mu_total")})
    noisy, law = counting_noise(many, seed=8, electronic=300.0), noise_variance(one, 300.0)
    error = np.sqrt(2/1999)
    for v in ("mu", "foil"):
        ratio = noisy[v].var("time", ddof=1).values/law[v].values
        assert abs(ratio.mean() - 1) < 4*error/np.sqrt(ratio.size) + 1e-3 and abs(ratio - 1).max() < 5*error
        assert abs((noisy[v].mean("time") - one[v])/np.sqrt(law[v]/2000)).max() < 5  # no bias
    assert float((counting_noise(many, electronic=0).i0 % 1).max()) == 0
    with pytest.raises(BattError, match="counts only"): expected_counts(one.assign(i0=one.i0*1e-6))


def test_glitches_stay_where_they_are(clean):
    ds, other = glitches(clean, seed=1), glitches(transmission(LFP), seed=1)
    assert 0.005 < float(ds.true_glitch.max()) < 0.2 and float(ds.true_glitch.min()) >= 0
    np.testing.assert_allclose(ds.i0, clean.i0*(1 - ds.true_glitch)); np.testing.assert_allclose((ds.mu - clean.mu).std("time"), 0, atol=1e-12)
    assert float(abs(ds.mu - clean.mu).max()) <= 0.05*float(ds.true_glitch.max()) + 1e-12 and other.energy.size != ds.energy.size


def test_beam_is_refilled(clean):
    t = np.arange(0, 3*24*3600.0, 600)
    long = clean.isel(time=np.zeros(t.size, int)).assign_coords(time=t)
    beam = beam_decay(long, seed=3, life=15.0, refill=8.0, flicker=0.0).true_beam.values
    jumps = np.flatnonzero(np.diff(beam) > 0)
    np.testing.assert_allclose(np.diff(t[jumps])/3600, 8.0, atol=0.2)
    np.testing.assert_allclose(np.diff(np.log(beam[jumps[0] + 1:jumps[1]])), -600/54000, rtol=1e-6)


def test_image_drift_moves_by_its_truth():
    stack = stack_of().astype("float64")
    ds = image_drift(stack, seed=6)
    for d in ("y", "x"):
        before, after = ((da*da[d]).sum(["y", "x"])/da.sum(["y", "x"]) for da in (stack, ds))
        np.testing.assert_allclose(after - before, ds[f"true_shift_{d}"], atol=0.02)
    assert ds.true_shift_x.units == "µm" and float(abs(ds.true_shift_x[:, 0]).max()) == 0 and float(np.hypot(ds.true_shift_x, ds.true_shift_y).max()) > 0.15
    flat = stack*0 + 0.7
    assert abs(float(pixel_noise(flat, seed=2, counts=5000).var())/(np.exp(0.7)/5000 + 1/50000) - 1) < 0.06
    with pytest.raises(BattError, match="darkest pixel"): pixel_noise(flat, counts=10)


def test_modes_and_chains_are_kept_apart(clean, bright):
    with pytest.raises(BattError, match="belongs to fluorescence"): self_absorption(clean)
    with pytest.raises(BattError, match="belongs to transmission"): harmonics(bright)
    with pytest.raises(BattError, match="no artefact"): add_artefacts(clean, strength={"self_absorption": 1.0})
    ds = add_artefacts(clean, strength={"counting_noise": 0, "energy_drift": 0, "glitches": 0}, seed=1)
    np.testing.assert_allclose(ds.mu, thickness_effect(harmonics(clean)).mu); assert "true_beam" in ds.coords


# -------------------------------------------------------------------------------------------------------------------------- files
def digest(paths): return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(paths))).hexdigest()


@pytest.mark.parametrize("kind, start", [("transmission", "2026-03-18T14:05:00.250000"), ("fluorescence", "2026-03-18T14:05:00+01:00")])
def test_xdi_round_trip(kind, start, clean, bright, tmp_path):
    data = add_artefacts(clean if kind == "transmission" else bright, seed=11)
    paths = write_xdi(tmp_path/"a", data, "Ni_{n:03d}.xdi", start=start, exposure=312.5)
    back = read(tmp_path/"a", technique="xas")
    assert float(abs(back.mu.values - data.mu.values).max()) <= (5.1e-7 if kind == "transmission" else 5.1e-10)
    assert float(abs(back.foil.values - data.foil.values).max()) <= 5.1e-7 and float(abs(back.i0.values - data.i0.values).max()) <= 0.051
    np.testing.assert_array_equal(back.energy, data.energy); np.testing.assert_allclose(back.time, data.time, atol=1e-6); np.testing.assert_array_equal(back.exposure, 312.5)
    utc = np.datetime64("2026-03-18T14:05:00.250") if kind == "transmission" else np.datetime64("2026-03-18T13:05:00")
    assert absolute_time(back)[0] == utc and (back.element, back.edge) == ("Ni", "K") and not [v for v in back.variables if str(v).startswith("true")]
    assert digest(paths) == digest(write_xdi(tmp_path/"b", data, "Ni_{n:03d}.xdi", start=start, exposure=312.5))
    assert b"true" not in paths[0].read_bytes()


def test_xdi_refuses_before_it_writes(clean, tmp_path):
    for bad, match in (({"names": "one.xdi", "exposure": 1.0}, "alike"), ({}, "how long")):
        with pytest.raises(BattError, match=match): write_xdi(tmp_path/"x", clean, **bad)
    with pytest.raises(BattError, match="0.01 eV"): write_xdi(tmp_path/"x", clean.assign_coords(energy=clean.energy + 0.004), exposure=1.0)
    with pytest.raises(BattError, match="their element"): write_xdi(tmp_path/"x", clean.drop_attrs(), start="2026-01-01", exposure=1.0)
    assert not (tmp_path/"x").exists()


def test_map_round_trip(tmp_path):
    stack = pixel_noise(image_drift(stack_of(), seed=1), seed=1)
    path = write_map(tmp_path/"maps.h5", stack, exposure=800.0)
    back = read(path, technique="xas", **SERIES_HINTS)
    np.testing.assert_array_equal(back.mu.transpose("time", "energy", "y", "x"), stack)
    for d in ("time", "energy", "y", "x"): np.testing.assert_array_equal(back[d], stack[d])
    assert abs(back.pixel_size_um - 0.1) < 1e-9 and back.start_time == "2026-03-18T14:05:00" and back.element == "Fe"
    assert digest([path]) == digest([write_map(tmp_path/"again.h5", stack, exposure=800.0)])
    single = read(write_map(tmp_path/"one.h5", stack[1].drop_vars("time")), technique="xas", **MAP_HINTS)
    np.testing.assert_array_equal(single.mu.transpose("energy", "y", "x"), stack[1])
    with pytest.raises(BattError, match="its element"): write_map(tmp_path/"x.h5", stack.drop_attrs())
    assert not (tmp_path/"x.h5").exists()


def test_import_is_light():
    code = "import sys, batt_nb.twin.xanes_artefacts, batt_nb.twin.xanes; print([m for m in ('xraydb', 'scipy.ndimage', 'scipy.interpolate', 'h5py', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
