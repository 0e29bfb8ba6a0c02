"""The twin's tomography: projector and propagator against independent ones, the contract of the artefacts, files read back by a campaign."""
import subprocess
import sys
import time

import numpy as np
import pytest
import xarray as xr

from batt_nb.campaign import Campaign, read
from batt_nb.core import BattError, flags, start_instant
from batt_nb.twin import xct
from batt_nb.twin.xct import (
    attenuation,
    delta,
    expose,
    illuminate,
    pin,
    project,
    project_slabs,
    propagate,
    radiograph,
    write_nxtomo,
    write_nxtomo_series,
    write_tiff_series,
)
from batt_nb.twin.xct_artefacts import ARTEFACTS, TYPICAL, sample_drift, scan_motion

START = "2026-03-25T10:15:00+01:00"


def electrode(n=32, nz=6, voxel=0.65, seed=0):
    """Labels and lithium of a few spheres."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(np.arange(nz)*voxel, np.arange(n)*voxel, np.arange(n)*voxel, indexing="ij")
    labels, lithium = np.zeros(z.shape, np.uint8), np.full(z.shape, np.nan)
    for _ in range(9):
        c, r = rng.uniform(4, 17, 2), rng.uniform(1.5, 3)
        d = np.sqrt((z - nz*voxel/2)**2 + (y - c[0])**2 + (x - c[1])**2)
        labels[(d < r + 0.7) & (labels == 0)] = 2
        labels[d < r] = 1
        lithium[d < r] = rng.uniform(0.3, 0.9)
    coords = {k: np.arange(m)*voxel for k, m in zip("zyx", z.shape, strict=True)}
    return xr.DataArray(labels, coords, ("z", "y", "x")), xr.DataArray(lithium, coords, ("z", "y", "x"))


@pytest.fixture(scope="module")
def transmission():
    return radiograph(*electrode(), "NMC811", 25.0, np.arange(0, 180, 6.0))


# -- attenuation ---------------------------------------------------------------------------------------------------------------------

# mass attenuation coefficients of Hubbell and Seltzer, NISTIR 5632 (cm2/g)
@pytest.mark.parametrize(("element", "energy", "nist"), [("C", 10, 2.373), ("C", 20, 0.4420), ("O", 20, 0.8653), ("Fe", 10, 170.6), ("Fe", 20, 25.68), ("Ni", 20, 32.20), ("Co", 20, 28.03)])
def test_elements_against_nist(element, energy, nist):
    import xraydb
    assert xraydb.mu_elam(element, 1e3*energy) == pytest.approx(nist, rel=0.01)


def test_mixtures_are_sums_by_mass():
    import xraydb
    weights = {"C": 12.011, "H": 1.008, "O": 15.999, "Li": 6.94, "P": 30.974, "F": 18.998}
    salt = {"Li": 1, "P": 1, "F": 6}
    moles = {"C": 3*(6.519 + 6.373), "H": 4*6.519 + 6*6.373, "O": 3*(6.519 + 6.373)} | salt
    mass = {k: moles[k]*weights[k] for k in moles}
    assert sum(mass.values()) == pytest.approx(1300, rel=1e-3) # g in a liter
    by_hand = 1.30e-4*sum(m*xraydb.mu_elam(k, 20e3) for k, m in mass.items())/sum(mass.values())
    assert attenuation("pore", 20.0) == pytest.approx(by_hand, rel=1e-3)
    solid = 1/(0.8/1.90 + 0.2/1.78)
    pvdf = sum(n*weights[k]*xraydb.mu_elam(k, 20e3) for k, n in {"C": 2, "H": 2, "F": 2}.items())/64.034
    binder = 0.5*1e-4*solid*(0.8*xraydb.mu_elam("C", 20e3) + 0.2*pvdf) + 0.5*attenuation("pore", 20.0)
    assert attenuation("binder", 20.0) == pytest.approx(binder, rel=1e-3)


def test_decrement_is_that_of_the_electrons():
    """Far above the edges delta = r0 lambda^2 n_e/2 pi."""
    electrons = 3.60/157.756*6.02214e23*(3 + 26 + 15 + 32)*1e-24 # per cubic Å
    expected = 2.8179e-5*(12.39842/60)**2*electrons/2/np.pi
    assert delta("LFP", 60.0, 1.0) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(("name", "energies"), [("LFP", (7.0, 7.3)), ("NMC811", (8.2, 8.5))])
def test_absorption_edge(name, energies):
    below, above = attenuation(name, np.array(energies), 0.9)
    assert above > 3*below


def test_volume_of_a_series():
    labels, lithium = electrode()
    series = xr.concat([lithium, 0.5*lithium], "time").assign_coords(time=[0.0, 900.0])
    mu = xct.attenuation_volume(labels, series, "LFP", 20.0)
    assert mu.dims == ("time", "z", "y", "x") and mu.dtype == np.float32 and mu.attrs["units"] == "1/µm"
    for t in (0, 1): np.testing.assert_array_equal(mu[t], xct.attenuation_volume(labels, series[t], "LFP", 20.0))
    grown = (mu[1] - mu[0]).where(labels == 1)
    assert float(grown.min()) > 0 # less lithium, more iron in a volume
    with pytest.raises(BattError, match="NMC811"): xct.attenuation_volume(labels, lithium, "NCA", 20.0)


# -- projections ---------------------------------------------------------------------------------------------------------------------

def blobs(n=64, seed=0):
    """A smooth object inside the inscribed circle, which any projector should agree on."""
    rng = np.random.default_rng(seed)
    y, x = (np.arange(n) - n//2)[:, None], np.arange(n) - n//2
    out = sum(a*np.exp(-((y - cy)**2 + (x - cx)**2)/2/s**2) for a, cy, cx, s in zip(rng.uniform(0.5, 1, 6), *rng.uniform(-11, 11, (2, 6)), rng.uniform(2.5, 4, 6), strict=True))
    return xr.DataArray(np.where(np.hypot(y, x) < n//2 - 2, out, 0), {"y": np.arange(n)*1.0, "x": np.arange(n)*1.0}, ("y", "x"), "attenuation")


def test_projector_against_skimage():
    from skimage.transform import radon
    v, angles = blobs(), np.linspace(0, 180, 37)
    ours, theirs = project(v, angles), radon(v.values, theta=angles).T
    assert np.sqrt(np.mean((ours.values - theirs)**2)) < 0.004*theirs.max() # theirs interpolates


def test_gaussian_has_a_known_projection():
    n, s = 65, 5.0
    y, x = (np.arange(n) - 32 - 4)[:, None], np.arange(n) - 32 - 7 # 4 and 7 pixels off the axis
    v = xr.DataArray(np.exp(-(y**2 + x**2)/2/s**2), {"y": np.arange(n)*2.0, "x": np.arange(n)*2.0}, ("y", "x"), "attenuation")
    for angle, blur in ((0.0, 0.0), (33.0, 1/6), (90.0, 0.0), (147.0, 1/6)): # a square voxel and a pixel widen it by 1/12 each, unless they coincide
        th = np.deg2rad(angle)
        t, wide = np.arange(n) - 32 - (7*np.cos(th) - 4*np.sin(th)), s**2 + blur
        np.testing.assert_allclose(project(v, [angle])[0], 2.0*s**2*np.sqrt(2*np.pi/wide)*np.exp(-t**2/2/wide), atol=2e-3)


@pytest.mark.parametrize("bin", [1, 2, 4])
def test_mass_and_reconstruction(bin):
    from skimage.transform import iradon
    v, angles = blobs(128), np.linspace(0, 180, 180, endpoint=False)
    p = project(v, angles, bin=bin)
    mass = p.sum("x")*p.pixel_size_um
    np.testing.assert_allclose(mass, float(v.sum()), rtol=1e-5)
    back, truth = iradon(p.values.T, theta=angles)/p.pixel_size_um, v.coarsen(y=bin, x=bin).mean().values
    assert np.sqrt(np.mean((back - truth)**2)) < 0.02*truth.max()
    assert float(p.true_center[0]) == pytest.approx(128//bin//2)


def test_detector_wider_and_moved():
    v = blobs()
    plain, wide = project(v, [0.0, 50.0]), project(v, [0.0, 50.0], columns=80)
    np.testing.assert_allclose(wide.isel(x=slice(8, 72)), plain, atol=1e-12)
    np.testing.assert_allclose(wide.x[8:72], plain.x)
    moved = project(v, [0.0, 50.0], columns=80, shift_um=3.0)
    np.testing.assert_allclose(moved[:, 3:], wide[:, :-3], atol=1e-6)
    np.testing.assert_allclose(moved.true_center, 43.0)
    half = project(v, [20.0], shift_um=0.5) # area-weighted: half of each neighbor at most two pixels away
    assert float(half.sum()) == pytest.approx(float(project(v, [20.0]).sum()), rel=1e-6)


def test_opposite_angles_are_mirror_images():
    a, b = project(blobs(65), [25.0, 205.0])
    np.testing.assert_allclose(a, b[::-1], atol=1e-6)


def test_slabs_equal_the_whole():
    labels, lithium = electrode(nz=24)
    mu = pin(xct.attenuation_volume(labels, lithium, "NMC811", 25.0))
    angles = np.arange(0, 180, 20.0)
    asked = []
    def read_slab(a, b):
        asked.append(b - a)
        return mu[a:b]
    parts = xr.concat(project_slabs(read_slab, 24, angles, slab=10, bin=2), "z")
    np.testing.assert_allclose(parts, project(mu, angles, bin=2), atol=1e-6*float(parts.max()))
    assert max(asked) == 10
    with pytest.raises(BattError, match="multiple of bin"): next(project_slabs(read_slab, 24, angles, slab=9, bin=2))


def test_slabs_of_a_propagated_wave():
    """Fringes couple rows: a halo brings the slabs close to the whole. What is left is the ringing of the mesh."""
    mu = pin(xct.attenuation_volume(*electrode(nz=48), "NMC811", 25.0))
    far = lambda p: propagate(p, 2.5e-4*p, 25.0, 20.0)
    whole = far(project(mu, [0.0, 30.0]))
    error = {halo: xr.concat(project_slabs(lambda a, b: mu[a:b], 48, [0.0, 30.0], slab=16, halo=halo, then=far), "z") - whole for halo in (0, 12)}
    assert error[12].shape == whole.shape
    assert float(error[12].std()) < 0.02*float(whole.std()) and float(error[12].std()) < 0.5*float(error[0].std())


def test_a_series_shares_its_matrices():
    labels, lithium = electrode()
    series = xr.concat([lithium]*3, "time").assign_coords(time=[0.0, 1.0, 2.0])
    p = project(pin(xct.attenuation_volume(labels, series, "LFP", 20.0)), [0.0, 30.0])
    assert p.dims == ("time", "angle", "z", "x")
    np.testing.assert_array_equal(p[0], p[2])


# -- propagation ---------------------------------------------------------------------------------------------------------------------

def test_propagation_of_a_known_wave():
    """A Gaussian wave spreads as its formula says: w(d)^2 = w0^2 (1 + (d lambda/pi w0^2)^2), intensity of its peak falling with 1/w."""
    n, pixel, w0, keV, d = 512, 0.25, 4.0, 20.0, 150.0
    x = (np.arange(n) - n/2 + 0.5)*pixel
    amplitude = np.exp(-x**2/w0**2)
    p = xr.DataArray(np.maximum(-2*np.log(amplitude + 1e-30), 0), {"x": x}, "x", attrs={"pixel_size_um": pixel})
    image = propagate(p, 0*p, keV, d)
    wavelength = 12.39842e-4/keV
    w = w0*np.sqrt(1 + (d*1e3*wavelength/np.pi/w0**2)**2)
    np.testing.assert_allclose(image, w0/w*np.exp(-2*x**2/w**2), atol=2e-4)


def test_propagation_refuses_the_far_field():
    p = xr.DataArray(np.zeros((1, 16)), {"angle": [0.0], "x": np.arange(16)*0.1}, ("angle", "x"), attrs={"pixel_size_um": 0.1})
    with pytest.raises(BattError, match="fringes reach"): propagate(p, p, 10.0, 1e4)
    np.testing.assert_allclose(propagate(p, p, 10.0, 1.0), 1.0, atol=1e-9)


# -- camera and artefacts ------------------------------------------------------------------------------------------------------------

def arrays(ds): return {k: v.values for k, v in (ds.data_vars.items() if isinstance(ds, xr.Dataset) else [("", ds)])}
def same(a, b): return all(np.array_equal(v, arrays(b)[k]) for k, v in arrays(a).items())
def change(a, b): return float(np.sqrt(np.mean(np.concatenate([np.ravel(v.astype(float) - arrays(b)[k]) for k, v in arrays(a).items()])**2)))


@pytest.mark.parametrize("name", ARTEFACTS)
def test_contract(name, transmission):
    f, ds = ARTEFACTS[name], illuminate(transmission, n_flats=4, n_darks=3)
    more = {"share": 0.05} if name in ("dead_stripes", "fluctuating_stripes", "partial_stripes") else {"rate": 3e-3} if name == "zingers" else {"per_row": 60.0} if name == "wide_stripes" else {}
    before = ds.copy(deep=True)
    clean = f(ds, strength=0, seed=3, **more)
    assert same(clean, ds) and clean.projections.dims == ds.projections.dims and set(ds.coords) < set(clean.coords)
    one = f(ds, seed=3, **more)
    assert same(one, f(ds, seed=3, **more)) and same(ds, before) and one.attrs == ds.attrs and one.projections.dtype == ds.projections.dtype
    assert name == "blur" or not same(one, f(ds, seed=4, **more))
    assert 0 <= change(f(ds, strength=1e-3, seed=3, **more), ds) < 0.02*change(one, ds) < change(f(ds, strength=2, seed=3, **more), ds)
    with pytest.raises(BattError, match="strength"): f(ds, strength=-0.1)


@pytest.mark.parametrize("name", [n for n in ARTEFACTS if n not in ("beam_drift", "read_noise")])
def test_transmission_and_line_integral_agree(name, transmission):
    """The same defect in either representation, and in a single row."""
    f = ARTEFACTS[name]
    lines = (-np.log(transmission)).rename("line_integral").assign_attrs(transmission.attrs)
    a, b = f(transmission, seed=5), f(lines, seed=5)
    np.testing.assert_allclose(-np.log(np.maximum(a, 1e-7)), b, atol=3e-4 if name == "noise" else 2e-5) # a rounded expectation may draw a photon more
    if name != "blur": np.testing.assert_allclose(f(lines.isel(z=2), seed=5), b.isel(z=2), atol=1e-6)


def test_series_of_scans(transmission):
    scans = xr.concat([transmission]*2, "time").assign_coords(time=[0.0, 900.0]).assign_attrs(transmission.attrs)
    ds = expose(scans, artefacts=TYPICAL, seed=1, n_flats=4)
    assert ds.projections.dims == ("time", "angle", "z", "x") and ds.projections.dtype == np.uint16
    assert ds.true_flicker.dims == ("time", "angle") and ds.true_zinger.dims == ("time", "angle", "z", "x")
    np.testing.assert_array_equal(ds.true_gain.dims, ("z", "x"))
    assert not np.array_equal(ds.projections[0], ds.projections[1]) # noise of their own
    drifted = sample_drift(scans, seed=1)
    assert drifted.true_shift_x.dims == ("time",) and float(drifted.true_shift_x[0]) == 0 and same(drifted[0], scans[0])
    crept = scan_motion(scans, seed=1)
    assert crept.true_motion_z.dims == ("time", "angle") and not np.allclose(crept.true_motion_x[0], crept.true_motion_x[1])
    assert same(sample_drift(scans, strength=0), scans) and same(scan_motion(scans, strength=0), scans)


def test_images_and_volumes_drift():
    v = xr.concat([blobs(48)]*4, "time").assign_coords(time=np.arange(4.0))
    out = sample_drift(v, seed=2)
    for axis in "yx":
        c = [float((f*f[axis]).sum()/f.sum()) for f in out]
        np.testing.assert_allclose(np.subtract(c, c[0]), out[f"true_shift_{axis}"], atol=0.05)
    volume = v.expand_dims(z=np.arange(5.0), axis=1)
    assert set(sample_drift(volume).coords) >= {"true_shift_z", "true_shift_y", "true_shift_x"}


def test_order_of_the_instrument(transmission):
    """A dead pixel has no photon noise: it is made after the photons."""
    ds = expose(transmission, artefacts={"dead_stripes": {"share": 0.05}, "noise": 1.0}, seed=2)
    dead = ds.true_dead.values == 1
    assert dead.any() and (np.ptp(ds.projections.values.astype(int), axis=0)[dead] == 0).all() and (np.ptp(ds.projections.values.astype(int), axis=0)[ds.true_dead.values == 0] > 0).all()


def test_flat_correction_leaves_the_noise_of_photons(transmission):
    ds = expose(transmission, artefacts={"noise": 1.0}, seed=3, n_flats=200, photons=4000)
    error = xct.correct_flat(ds) + np.log(transmission)
    assert float(error.std()) == pytest.approx(float(np.sqrt((1/transmission/4000).mean())), rel=0.15) # of the beam's stripes too
    assert abs(float(error.mean())) < 3e-3


# -- files ---------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scan(transmission):
    return expose(transmission.assign_attrs(start_time=START), artefacts=TYPICAL, seed=2, n_flats=5, n_darks=3)


def test_nxtomo_is_what_it_says(tmp_path, scan):
    import h5py
    path = write_nxtomo(tmp_path/"scan.nx", scan, title="NMC811, first charge")
    with h5py.File(path) as f:
        entry = f["entry"]
        assert entry["definition"][()] == b"NXtomo" and entry.attrs["NX_class"] == "NXentry" and f.attrs["default"] == "entry"
        assert entry["data/data"].shape == (5 + 3 + 30, 6, 32) and entry["data/rotation_angle"].attrs["units"] == "degree"
        np.testing.assert_array_equal(entry["instrument/detector/image_key"], [2]*3 + [1]*5 + [0]*30)
        np.testing.assert_allclose(entry["instrument/detector/count_time"], 0.1)
        assert entry["end_time"][()].decode().startswith("2026-03-25T10:15:03.6")
    ds = read(path)
    for name in ("projections", "flats", "darks"): np.testing.assert_array_equal(ds[name], scan[name])
    np.testing.assert_array_equal(ds.angle, scan.angle)
    assert ds.attrs["pixel_size_um"] == pytest.approx(0.65) and float(ds.energy) == pytest.approx(25000) and ds.attrs["start_time"] == START
    assert not any("pixel" in f for f in flags(ds))


def test_same_bytes(tmp_path, scan):
    frames = scan.projections[:3].reset_coords(drop=True).rename(angle="time").assign_coords(time=[0.0, 60.0, 120.0]).assign_attrs(start_time=START)
    made = []
    for k in ("a", "b"):
        made.append([write_nxtomo(tmp_path/f"{k}.nx", scan).read_bytes(), *(p.read_bytes() for p in write_tiff_series(tmp_path/k, frames)), (tmp_path/f"{k}_log.csv").read_bytes()])
        if k == "a": time.sleep(1.1) # a clock of today would show
    assert made[0] == made[1]
    again = expose(radiograph(*electrode(), "NMC811", 25.0, np.arange(0, 180, 6.0)).assign_attrs(start_time=START), artefacts=TYPICAL, seed=2, n_flats=5, n_darks=3)
    assert write_nxtomo(tmp_path/"c.nx", again).read_bytes() == made[0][0]


def test_scans_of_a_campaign(tmp_path, transmission):
    scans = xr.concat([transmission]*3, "time").assign_coords(time=[0.0, 900.0, 1800.5]).assign_attrs(transmission.attrs, start_time=START)
    ds = expose(scans, artefacts={"noise": 1}, n_flats=2, n_darks=2)
    write_nxtomo_series(tmp_path/"raw", ds)
    back = read(tmp_path/"raw")
    assert back.projections.dims == ("time", "angle", "y", "x")
    np.testing.assert_array_equal(back.projections, ds.projections); np.testing.assert_allclose(back.time, [0, 900, 1800.5])


def test_radiographs_through_a_whole_campaign(tmp_path, scan):
    seconds = [0.0, 600.0, 1200.25]
    frames = scan.projections[:3].reset_coords(drop=True).rename(angle="time").assign_coords(time=seconds).assign_attrs(start_time=START)
    write_tiff_series(tmp_path/"raw"/"xct", frames, exposure_s=2.0)
    (tmp_path/"campaign.toml").write_text('[campaign]\nname = "twin"\n[cells.A]\nelectrode_material = "LiNi0.8Mn0.1Co0.1O2"\nactive_mass_mg = 10.0\n'
        '[techniques.xct]\ncell = "A"\nfiles = ["raw/xct/*.tif"]\n[techniques.xct.clock]\ntable = "raw/xct_log.csv"\nkey = "frame"\n', encoding="utf-8")
    ds = Campaign.open(tmp_path).ingest()["xct"]
    np.testing.assert_array_equal(ds.image, frames); np.testing.assert_allclose(ds.time, seconds); np.testing.assert_allclose(ds.exposure, 2.0)
    assert start_instant(ds)[0] == np.datetime64("2026-03-25T09:15:00", "ns") and ds.attrs["pixel_size_um"] == pytest.approx(0.65, rel=1e-5)


def test_slices_through_a_window(tmp_path):
    images = xr.DataArray(np.linspace(0, 0.012, 2*5*7).reshape(2, 5, 7), {"time": [0.0, 60.0], "y": np.arange(5)*1.3, "x": np.arange(7)*1.3}, ("time", "y", "x"), attrs={"start_time": START})
    paths = write_tiff_series(tmp_path/"slices", images, window=(-0.002, 0.012))
    back = np.stack([read(p).image for p in paths])
    np.testing.assert_allclose(-0.002 + back/65535*0.014, images, atol=0.014/65535/2*1.01)
    import tifffile
    with tifffile.TiffFile(paths[1]) as t: assert t.pages[0].tags["DateTime"].value == "2026:03:25 10:16:00" and "0.012" in t.pages[0].description
    with pytest.raises(BattError, match="started"): write_tiff_series(tmp_path/"x", images.drop_attrs(), window=(0, 1))


def test_import_is_light():
    code = "import sys, batt_nb.twin.xct, batt_nb.twin.xct_artefacts; print([m for m in ('xraydb', 'skimage', 'h5py', 'tifffile', 'scipy', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
