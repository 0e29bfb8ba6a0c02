"""The twin's diffraction against published figures, against formulas worked out another way, and through the files that `read` opens."""
import shutil
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from batt_nb.campaign import Campaign, read
from batt_nb.campaign.manifest import Clock
from batt_nb.campaign.reading import set_clock
from batt_nb.core import BattError, absolute_time
from batt_nb.twin import structures as st
from batt_nb.twin import xrd
from batt_nb.twin import xrd_artefacts as art
from batt_nb.twin import xrd_files as files
from conftest import DATA, needs_data

X = np.linspace(0, 1, 101)
ANGLES = np.arange(4.0, 14.0, 0.01)


def shares(*rows, **coords):
    return xr.DataArray(np.array(rows), dims=("time", "lithium_content"), coords={"time": 600.0*np.arange(len(rows)), "lithium_content": X} | coords, attrs={"start_time": "2026-03-01T10:00:00"})


def point(i): return np.eye(101)[i]


def lines(structure, wavelength=1.5406, two_theta_max=100.0, polarization=1.0):
    r = st.reflections(structure, wavelength, two_theta_max, polarization)
    return dict(zip(r.hkl.values.tolist(), zip(r.two_theta.values, 100*r.intensity.values/r.intensity.values.max(), strict=True), strict=True))


# (structure, hkl): 2θ for Cu Kα1; triphylite as commonly listed; Al, Cu: NBS cards PDF 4-0787, 4-0836; graphite: cell of Trucano and Chen, Nature 258, 136 (1975)
PUBLISHED = {"LIFEPO4": {"2 0 0": 17.16, "1 0 1": 20.79, "1 1 1": 25.58, "0 2 0": 29.73, "3 0 1": 32.23, "3 1 1": 35.60},
             "GRAPHITE": {"0 0 2": 26.54, "1 0 0": 42.32, "0 0 4": 54.66}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_lines_stand_where_they_are_published(name):
    found = lines(getattr(st, name))
    for hkl, at in PUBLISHED[name].items(): assert found[hkl][0] == pytest.approx(at, abs=0.05)


@pytest.mark.parametrize("name, known", [("Al", {"1 1 1": (38.472, 100), "2 0 0": (44.738, 47)}), ("Cu", {"1 1 1": (43.297, 100), "2 0 0": (50.433, 46)})])
def test_metals_agree_with_the_cards(name, known):
    found = lines(st.ELEMENTS[name])
    for hkl, (at, i) in known.items(): assert found[hkl][0] == pytest.approx(at, abs=0.05) and found[hkl][1] == pytest.approx(i, abs=2)


def test_a_structure_factor_by_hand():
    """fcc and graphite: the extinctions and sums of the textbooks."""
    al = st.ELEMENTS["Al"]
    f = st.structure_factors(al, [[1, 1, 1], [1, 0, 0], [2, 1, 0], [2, 0, 0]], 1.5406)
    s = np.sqrt(3)/4.04958/2
    assert f[0] == pytest.approx(4*st.form_factor("Al", s, 1.5406)*np.exp(-0.86*s**2), abs=1e-9) and abs(f[1]) < 1e-9 > abs(f[2])
    g = st.structure_factors(st.GRAPHITE, [[0, 0, 1], [0, 0, 2]], 1.5406)
    assert abs(g[0]) < 1e-9 and abs(g[1]) == pytest.approx(4*abs(st.form_factor("C", 1/6.711, 1.5406))*np.exp(-0.9/6.711**2), rel=1e-9)


def test_symmetry_gives_the_powder_sum_of_all_lattice_vectors():
    """Multiplicity times one member equals the sum over every hkl of the sphere."""
    for structure in (st.LIFEPO4, st.nmc(0.5), st.LIC6):
        hkl = st.lattice_vectors(structure, 0.9)
        total = (np.abs(st.structure_factors(structure, hkl, 1.0))**2).sum()
        r = st.reflections(structure, 1.0, np.degrees(2*np.arcsin(1/1.8)))
        assert float((r.multiplicity*r.F2).sum()) == pytest.approx(total, rel=1e-4)


def test_march_dollase_keeps_the_mean_and_favors_the_basal_plane():
    everywhere = st.lattice_vectors(st.LIFEPO4, 0.35) # directions about evenly spread
    assert st.march_dollase(st.LIFEPO4, everywhere, (1, 0, 0), 0.6).mean() == pytest.approx(1, abs=0.02)
    basal, prism = st.march_dollase(st.GRAPHITE, [[0, 0, 2], [1, 0, 0]], (0, 0, 1), 0.6)
    assert basal == pytest.approx(0.6**-3) and prism == pytest.approx(0.6**1.5)


def test_two_phases_add_and_one_phase_moves():
    ends = xrd.powder(shares(point(99), point(2)), "LFP", 0.5, ANGLES)
    half = xrd.powder(shares(0.5*point(99) + 0.5*point(2)), "LFP", 0.5, ANGLES)
    np.testing.assert_allclose(half[0], ends.mean("time"), rtol=1e-9)
    nmc = xrd.powder(shares(*[point(i) for i in (95, 60, 40, 30, 20)]), "NMC811", 0.5, ANGLES)
    at = nmc.sel(two_theta=slice(5.6, 6.4)).idxmax("two_theta").values
    assert at[0] > at[1] > at[2] < at[3] < at[4] and at[4] - at[2] > 0.1 # turns where c is largest


@pytest.mark.parametrize("name", ["LFP", "NMC811", "graphite"])
@pytest.mark.parametrize("wavelength, instrument", [(0.5, xrd.SYNCHROTRON), (1.5406, xrd.LAB)])
def test_both_wavelengths(name, wavelength, instrument):
    angles = ANGLES if wavelength < 1 else np.arange(15, 60, 0.02)
    da = xrd.powder(shares(point(90)), name, wavelength, angles, instrument=instrument, sample=xrd.Sample(inactive={"Al": 4.0, "Cu": 4.5, "Li": 2.7, "PE": 1.0, "PP": 1.0}))
    assert da.attrs["units"] == "counts" and da.wavelength == wavelength and float(da.min()) > 0
    strongest = max(((i, t) for s in [st.phases(name, 0.9)[-1][1]] for t, i in lines(s, wavelength, angles[-1], instrument.polarization).values() if t > angles[0]))[1]
    near = da[0].sel(two_theta=slice(strongest - 0.3, strongest + 0.3))
    assert float(near.idxmax()) == pytest.approx(strongest, abs=0.02)


def test_counts_scale_with_what_is_in_the_beam():
    thin, thick = (xrd.library("LFP", [1.0], 0.5, ANGLES, sample=xrd.Sample(loading=m, electrolyte=0)) for m in (1.0, 2.0))
    mu = [xrd.optical_thickness("LFP", 0.5, xrd.Sample(loading=m, electrolyte=0)) for m in (1.0, 2.0)]
    np.testing.assert_allclose(thick/thin, 2*(xrd.transmission(ANGLES, mu[1])/xrd.transmission(ANGLES, mu[0]))[None], rtol=1e-9)
    assert mu[1] == pytest.approx(2*mu[0]) and 0.005 < mu[0] < 0.007 # 6 cm²/g of LiFePO4 at 24.8 keV


def test_leading_dimensions_and_time_are_kept():
    share = xr.DataArray(np.tile(point(50), (2, 3, 4, 1)), dims=("time", "y", "x", "lithium_content"), coords={"time": [0.0, 5.0], "lithium_content": X})
    da = xrd.powder(share, "NMC811", 0.5, ANGLES, exposure=2.0)
    assert da.dims == ("time", "y", "x", "two_theta") and da.exposure.values.tolist() == [2, 2]


@pytest.mark.parametrize("bad, says", [
    (lambda: xrd.powder(shares(2*point(5)), "LFP", 0.5, ANGLES), "sum to 1"), (lambda: xrd.powder(shares(point(5)), "LCO", 0.5, ANGLES), "no material"),
    (lambda: xrd.powder(shares(point(5)), "LFP", 0.5, ANGLES[::-1]), "rising"), (lambda: xrd.powder(shares(point(5)).rename(lithium_content="x"), "LFP", 0.5, ANGLES), "lithium_content"),
    (lambda: xrd.line_shape(10.0, 0.5, (1e-3, -5e-3, 1e-4), 100, 0), "negative width"), (lambda: st.polarization_ratio("neutron"), "source"),
    (lambda: st.phases("graphite", -0.1), "between 0 and 1")])
def test_what_is_refused(bad, says):
    with pytest.raises(BattError, match=says): bad()


@pytest.fixture(scope="module")
def clean(): return xrd.powder(shares(*[(1 - q)*point(99) + q*point(2) for q in (0, 0.3, 0.7, 1)]), "LFP", 0.5, ANGLES, exposure=57.0)


def test_every_artefact_keeps_the_contract(clean):
    frames = xrd.rings(clean, xrd.Detector(pixel=400, shape=(64, 64), center=(32, 32)))
    for name, f in art.ARTEFACTS.items():
        options = {"module": 1.0, "width": 0.1} if name == "gaps" else {"cosmics": 5.0} if name == "spikes" else {}
        for data in (clean, *([] if name in ("displace", "creep") else [frames])):
            if data is frames and name == "gaps": options = {"module": 20}
            before = data.copy(deep=True)
            assert f(data, strength=0, **options).values.tobytes() == data.values.tobytes(), name
            one, again, other = f(data, seed=3, **options), f(data, seed=3, **options), f(data, seed=4, **options)
            assert one.identical(again) and not one.equals(other) and data.identical(before), name
            assert one.dims == data.dims and all(str(c).startswith("true_") for c in set(one.coords) - set(data.coords)), name


def test_truth_undoes_the_artefact(clean):
    decayed = art.decay(art.creep(clean, seed=2), seed=2)
    np.testing.assert_allclose(decayed/decayed.true_flux - decayed.true_background, clean, rtol=1e-9)
    moved = art.displace(clean, seed=2, strength=3)
    shift = art.shift_of(ANGLES, float(moved.true_zero), float(moved.true_displacement[2]), 760.0)
    again = xrd.powder(shares(0.3*point(99) + 0.7*point(2)), "LFP", 0.5, ANGLES - shift, exposure=57.0)[0] # the model at the true angles
    assert np.abs(shift).max() > 0.005 and np.abs(again.values - moved[2].values)[3:-3].max() < 0.01*float(clean.max())


def test_rings_keep_the_photons(clean):
    """The sum over a frame is the integral of the pattern over the solid angle of its pixels."""
    detector = xrd.Detector(pixel=300, shape=(100, 120), center=(40, 55))
    frame = xrd.rings(clean[:1], detector, finer=4)[0]
    t = detector.two_theta(*np.meshgrid(np.arange(100) + 0.5, np.arange(120) + 0.5, indexing="ij"))
    flat = xrd.rings(clean[:1]*0 + 10.0, detector)[0]
    inside = (t > 4.1) & (t < 13.9)
    np.testing.assert_allclose(flat.values[inside], 10*np.cos(np.radians(t[inside]))**3, rtol=1e-4)
    assert float(frame.max()) <= float(clean[0].max()) and (frame.values[t < 3.9] == 0).all()


def test_crystals_of_a_map_keep_their_orientation():
    ids = xr.DataArray([[1, 1, 2]], dims=("y", "x"), coords={"y": [0.0], "x": [0.0, 1.0, 2.0]})
    lithium = xr.DataArray([[[0.9, 0.9, 0.9]], [[0.4, 0.9, 0.9]]], dims=("time", "y", "x"), coords={"time": [0.0, 1.0], "y": [0.0], "x": [0.0, 1.0, 2.0]})
    da = xrd.crystal_map(lithium, xr.ones_like(ids)*1.0, ids, "NMC811", 0.5, np.arange(4, 22, 0.02), rocking=1.0, levels=11, seed=4)
    assert (da[0, 0, 0] == da[0, 0, 1]).all() and (da[0, 0, 1] == da[1, 0, 1]).all() # same crystal, same content
    assert np.abs(da[1, 0, 0] - da[0, 0, 0]).max() > 0 and np.abs(da[0, 0, 2] - da[0, 0, 0]).max() > 0


MANIFEST = """
[campaign]
name = "twin"
[cells.A]
electrode_material = "LiFePO4"
[techniques.xrd]
cell = "A"
files = ["raw/*.xye"]
[techniques.xrd.hints]
wavelength = 0.5
[techniques.xrd.clock]
table = "raw/log.csv"
key = "scan_number"
timezone = "Europe/Paris"
"""


def test_a_campaign_takes_its_times_from_the_log(tmp_path, clean):
    measured = art.measured(clean, seed=1)
    numbers = [101, 102, 103, 104]
    files.write_xye(tmp_path/"raw", measured, [f"{n}_summed.xye" for n in numbers])
    files.write_scan_log(tmp_path/"raw"/"log.csv", numbers, *files.scan_times(measured))
    (tmp_path/"campaign.toml").write_text(MANIFEST, encoding="utf-8")
    ds = Campaign.open(tmp_path).ingest(progress=False)["xrd"]
    kept = measured.dropna("two_theta", how="all")
    np.testing.assert_allclose(ds.intensity.values, kept.values, atol=1e-6)
    assert str(absolute_time(ds)[3]) == "2026-03-01T09:30:00.000000000" and ds.exposure.values.tolist() == [57]*4 and ds.wavelength == 0.5


def test_files_are_the_same_bytes_again(tmp_path, clean):
    counted = art.count(clean, seed=1)
    frames = art.count(xrd.rings(clean, xrd.Detector(pixel=400, shape=(64, 64), center=(32, 32))), seed=1)
    cube = art.count(clean.expand_dims(y=[0.0, 1.0], x=[0.0]).transpose("time", "y", "x", "two_theta"), seed=1)
    for d in ("a", "b"):
        files.write_xye(tmp_path/d, counted, ["1.xye", "2.xye", "3.xye", "4.xye"])
        files.write_frames(tmp_path/d, frames, ["1.edf", "2.edf", "3.tif", "4.tif"])
        files.write_map(tmp_path/d/"map.h5", cube)
        files.write_poni(tmp_path/d/"x.poni", xrd.Detector(), 0.5)
    names = sorted(p.name for p in (tmp_path/"a").iterdir())
    assert len(names) == 10 and all((tmp_path/"a"/n).read_bytes() == (tmp_path/"b"/n).read_bytes() for n in names)
    shutil.rmtree(tmp_path/"b")
    back = set_clock(read(tmp_path/"a"/"map.h5", technique="xrd"), Clock(start="2026-03-01T10:00:00", frame_time_s=600))
    assert back.intensity.dims == ("time", "y", "x", "two_theta") and (back.intensity.values == cube.values).all() and back.y.values.tolist() == [0, 1]


@needs_data
def test_a_measured_powder_has_these_intensities():
    """Rutile on a laboratory diffractometer: peak areas within 10 points of the strongest."""
    rutile = st.Structure("rutile", "P42/mnm", (4.593, 4.593, 2.959), (st.Site("Ti", (0, 0, 0), B=0.45), st.Site("O", (0.3051, 0.3051, 0), B=0.45)), 2, "Meagher and Lager 1979")
    raw, ours = read(DATA/"xrd/formats/TiO2.raw", technique="xrd"), lines(rutile, two_theta_max=70)
    x, y = raw.two_theta.values, raw.intensity.values

    def area(at):
        m = np.abs(x - at) < 0.6
        feet = np.polyfit(np.r_[x[m][:5], x[m][-5:]], np.r_[y[m][:5], y[m][-5:]], 1)
        return np.trapezoid(y[m] - np.polyval(feet, x[m]), x[m])
    hkl = ["1 1 0", "1 0 1", "1 1 1", "2 1 1", "2 2 0"]
    measured = np.array([area(ours[h][0]) for h in hkl])
    np.testing.assert_allclose([ours[h][1] for h in hkl], 100*measured/measured[0], atol=10)


def test_the_fepo4_coordinates_make_sense():
    """Bond valences of Fe(III) and P(V); a wrong digit in a coordinate would show."""
    kinds, xyz, _, _ = st.atoms(st.FEPO4)
    oxygen = xyz[[k == "O" for k in kinds]]
    near = np.stack(np.meshgrid(*[np.arange(-1, 2)]*3, indexing="ij"), -1).reshape(-1, 3)
    for element, r0, charge in (("Fe", 1.759, 3), ("P", 1.617, 5)):
        d = np.linalg.norm((oxygen[:, None] + near - xyz[kinds.index(element)])*st.FEPO4.cell, axis=-1).ravel()
        assert np.exp((r0 - d[d < 2.6])/0.37).sum() == pytest.approx(charge, abs=0.15)
    assert replace(st.FEPO4, name="x") != st.FEPO4
