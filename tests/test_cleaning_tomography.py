"""Reconstruction, axis, alignment and phase retrieval against chords, scikit-image, propagated waves and a measured scan."""
import numpy as np
import pytest
import torch
import xarray as xr
from skimage.transform import iradon, radon

from batt_nb.cleaning.scan_geometry import align_projections, correct_tilt, find_center, retrieve_phase
from batt_nb.cleaning.tomography import Projector, angle_weights, back, forward, reconstruct, to_16bit, write_slices
from batt_nb.core import BattError, flags, history
from batt_nb.twin.xct import attenuation, correct_flat, delta, expose, propagate, radiograph
from batt_nb.twin.xct_artefacts import scan_motion
from conftest import DATA, needs_data

PIXEL = 0.65


pytestmark = pytest.mark.usefixtures("one_thread")


def balls(angles, seed=0, n=96, rows=6, center=None, dz=0.0, count=14, pin=0.42, photons=None):
    """Line integrals (angle, z, x) of balls in a cylinder, from their chords on four points across a pixel; noise of counted photons."""
    rng, th = np.random.default_rng([7, seed]), np.deg2rad(angles)[:, None, None]
    center = np.broadcast_to(n//2 if center is None else center, len(angles))[:, None, None]
    u = np.arange(n)[:, None] + (np.arange(4) + 0.5)/4 - 0.5 - center
    z = (np.arange(rows) - np.broadcast_to(dz, len(angles))[:, None])[:, :, None, None]
    p = 0.0015*2*np.sqrt(np.maximum((pin*n)**2 - u**2, 0))[:, None] + np.zeros((1, rows, 1, 1))
    for _ in range(count):
        r, a, d, bz, m = rng.uniform(0.04, 0.1)*n, rng.uniform(0, 2*np.pi), 0.3*n*np.sqrt(rng.uniform()), rng.uniform(0, rows), rng.uniform(0.004, 0.012)
        t = u - d*(np.cos(a)*np.cos(th) - np.sin(a)*np.sin(th))
        p += m*2*np.sqrt(np.maximum(r**2 - t[:, None]**2 - (z - bz)**2, 0))
    p = p.mean(-1)
    if photons: p = -np.log(np.maximum(rng.poisson(photons*np.exp(-p)), 1)/photons)
    return xr.DataArray(p, {"angle": np.asarray(angles, float), "z": PIXEL*np.arange(rows), "x": PIXEL*np.arange(n)}, ("angle", "z", "x"), "line_integral", {"units": "1", "pixel_size_um": PIXEL, "energy_keV": 25.0})


def disk(radius_um, mu, n, angles, pixel=PIXEL, center=None):
    """The sinogram of one disk, mean of 16 points across a pixel."""
    u = (np.arange(n)[:, None] + (np.arange(16) + 0.5)/16 - 0.5 - (n//2 if center is None else center))*pixel
    row = (2*mu*np.sqrt(np.maximum(radius_um**2 - u**2, 0))).mean(-1)
    return xr.DataArray(np.tile(row, (len(angles), 1)), {"angle": angles, "x": pixel*np.arange(n)}, ("angle", "x"), "line_integral")


HALF = np.linspace(0, 180, 90, endpoint=False)


@pytest.mark.parametrize("n, many, name", [(64, 40, "ramp"), (65, 37, "shepp-logan"), (80, 60, "cosine")])
def test_fbp_equals_scikit_image(n, many, name):
    rng = np.random.default_rng(n)
    image = rng.uniform(size=(n, n))*(np.hypot(*(np.indices((n, n)) - n//2)) < n//2 - 1)
    angles = np.linspace(0, 180, many, endpoint=False)
    p = radon(image, angles)
    ours = reconstruct(xr.DataArray(p.T, {"angle": angles, "x": np.arange(n)*0.5}, ("angle", "x")), filter_name=name)
    theirs = iradon(p, angles, filter_name=name)/0.5
    assert np.abs(ours.values - theirs).max() < (2e-5 if name == "ramp" else 2e-4)*np.abs(theirs).max()


def test_attenuation_is_in_one_over_micrometer():
    for pixel, n in ((0.65, 128), (0.325, 128)):
        scan = disk(25.0*pixel/0.325*0.5, 0.0123, n, HALF, pixel)
        image = reconstruct(scan)
        core = np.hypot(image.y - image.y[n//2], image.x - image.x[n//2]) < 0.7*25*pixel/0.65
        assert image.units == "1/µm" and abs(float(image.where(core).mean())/0.0123 - 1) < 2e-3
    unknown = reconstruct(scan.drop_vars("x"))
    assert unknown.units == "1/pixel" and "pixel size is unknown" in flags(unknown)[0]
    assert np.allclose(unknown/0.325, image, atol=1e-7) and np.allclose(reconstruct(scan.drop_vars("x"), pixel_um=0.325), image, atol=1e-7)


@pytest.mark.parametrize("angles", [np.linspace(0, 360, 181), np.sort(np.random.default_rng(0).uniform(0, 180, 150)), np.arange(150)*111.246118, np.linspace(30, -150, 120)])
def test_any_angles(angles):
    want = reconstruct(balls(np.linspace(0, 180, 300, endpoint=False), rows=1))
    got = reconstruct(balls(angles, rows=1))
    inner = np.hypot(*(np.indices((96, 96)) - 48)) < 44
    assert float(np.sqrt(((got - want).values[0][inner]**2).mean())) < 0.12*0.01/PIXEL


def test_axis_anywhere_and_moving():
    want = reconstruct(balls(HALF, rows=2))
    for c in (44.37, 53.0, 48 + 4*np.sin(np.arange(90)/9)):
        got = reconstruct(balls(HALF, rows=2, center=c), xr.DataArray(c, dims="angle") if np.ndim(c) else c)
        inner = np.hypot(*(np.indices((96, 96)) - 48)) < 38
        assert np.sqrt(((got - want).values[:, inner]**2).mean()) < 0.06*0.01/PIXEL
    two = reconstruct(xr.concat([balls(HALF, rows=2)[:, 0], balls(HALF, rows=2, center=50.5)[:, 1]], "z"), xr.DataArray([48.0, 50.5], dims="z"))
    assert np.sqrt(((two - want).values[:, inner]**2).mean()) < 0.06*0.01/PIXEL


def test_weights_add_up_to_half_a_turn():
    rng = np.random.default_rng(3)
    for _ in range(30):
        angles = rng.uniform(-200, 400, rng.integers(90, 300))
        weight, missing = angle_weights(angles)
        assert abs(weight.sum() + np.deg2rad(missing) - np.pi) < 1e-9 and (weight >= 0).all()
    assert abs(angle_weights(np.linspace(-60, 60, 121))[1] - 59) < 1e-6


def test_projectors_are_matched():
    g = torch.Generator().manual_seed(1)
    for angles, circle in ((np.arange(0, 180, 10.0), True), (np.array([1.0, 44.9, 45.0, 90.0, 133.0]), False)):
        geo = Projector(angles, 15, circle=circle)
        image, p = torch.randn(2, 31, 31, generator=g), torch.randn(2, len(angles), 2*geo.reach + 1, generator=g)
        assert torch.allclose((forward(geo, image)*p).sum((1, 2)), (image*back(geo, p)).sum((1, 2)), atol=2e-3)


def test_iterations_and_missing_angles():
    few = balls(np.linspace(0, 180, 20, endpoint=False), rows=1, photons=2e4)
    want = reconstruct(balls(np.linspace(0, 180, 300, endpoint=False), rows=1))
    off = {m: float(np.sqrt(((reconstruct(few, method=m, iterations=k) - want)**2).mean())) for m, k in (("fbp", 0), ("sirt", 40), ("cgls", 8))}
    assert off["sirt"] < 0.6*off["fbp"] and off["cgls"] < 0.7*off["fbp"]
    assert float(reconstruct(few, method="sirt", iterations=5).min()) >= 0
    assert "59.0 degrees of half a turn are missing" in flags(reconstruct(balls(np.linspace(-60, 60, 121), rows=1)))[0]
    assert not flags(reconstruct(few))


def test_wider_than_the_detector():
    wide = disk(60.0, 0.004, 128, HALF) # 185 columns across
    with_flag, edge, known = reconstruct(wide), reconstruct(wide, pad="edge"), reconstruct(wide, sample_um=120.0)
    r = np.hypot(*(np.indices((128, 128)) - 64))
    off = [float(np.abs(v.values/0.004 - 1)[r < 60].mean()) for v in (with_flag, edge, known)]
    rim = [float(np.abs(v.values/0.004 - 1)[(r > 56) & (r < 62)].mean()) for v in (with_flag, edge)]
    assert "reaches the edges" in flags(with_flag)[0] and off[1] < off[0] and rim[1] < 0.6*rim[0] and off[2] < 0.01
    with pytest.raises(BattError, match="diameter"): reconstruct(wide, sample_um=-1)


def test_chunks_give_the_same_and_stay_lazy():
    p = balls(HALF, rows=6, center=50.2)
    before, chunked = p.copy(deep=True), p.chunk(z=2)
    image = reconstruct(p, 50.2)
    for later in (reconstruct(chunked, 50.2), reconstruct(p.chunk(z=3, angle=30), 50.2)):
        assert later.chunks is not None and np.allclose(later.values, image.values, atol=1e-7)
    assert np.allclose(find_center(chunked).center_row, find_center(p).center_row)
    transmitted = np.exp(-p)
    how = dict(delta_beta=300.0, distance_mm=10.0)
    transmitted.attrs = p.attrs
    later = retrieve_phase(transmitted.chunk(angle=30), **how)
    assert later.chunks is not None and np.allclose(later.values, retrieve_phase(transmitted, **how).values, atol=1e-6)
    xr.testing.assert_identical(p, before)
    series = xr.concat([p, 2*p], "time")
    both = reconstruct(series.chunk(time=1), 50.2)
    assert both.dims == ("time", "z", "y", "x") and np.allclose(both[1].values, 2*image.values, atol=1e-6)
    assert image.attrs["energy_keV"] == 25.0 and history(image)[-1]["function"] == "cleaning.tomography.reconstruct"


def test_sixteen_bits(tmp_path):
    volume = reconstruct(balls(HALF, rows=3))
    counts = to_16bit(volume)
    assert float(np.abs(counts.offset_16bit + counts.scale_16bit*counts.astype(float) - volume).max()) < 0.51*counts.scale_16bit
    assert counts.units_16bit == "1/µm" and counts.dtype == np.uint16
    assert "2." in flags(to_16bit(xr.DataArray(np.arange(100.0), dims="x"), window=(0, 97)))[0] # two of a hundred
    assert int(to_16bit(xr.DataArray([np.nan, 0.0, 1.0], dims="x"))[0]) == 0
    later = to_16bit(volume.chunk(z=1), window=(counts.offset_16bit, counts.offset_16bit + 65535*counts.scale_16bit))
    assert later.chunks is not None and (later.values == counts.values).all()
    import tifffile
    paths = write_slices(tmp_path/"slices", counts)
    assert len(paths) == 3 and (tifffile.imread(paths[2]) == counts.values[2]).all()
    assert "count, in 1/um" in tifffile.TiffFile(paths[0]).pages[0].description
    with pytest.raises(BattError, match="high above low"): to_16bit(volume, window=(1, 1))


@pytest.mark.parametrize("angles, law", [(HALF, "wedge"), (np.linspace(0, 180, 91), "wedge"), (np.linspace(0, 360, 90, endpoint=False), "opposite"), (np.linspace(-65, 65, 80), "mass")])
def test_center_and_its_sigma(angles, law):
    z = []
    for seed in range(8):
        c = 48 + np.random.default_rng([8, seed]).uniform(-6, 6)
        found = find_center(balls(angles, seed, rows=4, center=c, photons=1e4))
        assert found.method == law and abs(float(found.center) - c) < 0.3
        z.append((float(found.center) - c)/float(found.center_sigma))
    assert np.sqrt(np.mean(np.square(z))) < 1.6 and np.abs(z).max() < 4


@pytest.mark.slow
def test_center_sigma_covers():
    for angles in (HALF, np.linspace(0, 360, 90, endpoint=False), np.linspace(-65, 65, 80)):
        for photons in (2e3, 5e4):
            cs = [48 + np.random.default_rng([9, seed]).uniform(-6, 6) for seed in range(60)]
            fs = [find_center(balls(angles, 100 + seed, rows=4, center=c, photons=photons)) for seed, c in enumerate(cs)]
            z = np.array([(float(f.center) - c)/float(f.center_sigma) for f, c in zip(fs, cs, strict=True)])
            assert np.isfinite(z).mean() > 0.9 and np.mean(np.abs(z[np.isfinite(z)]) < 1.96) > 0.88


def test_center_refuses_what_says_nothing():
    p = balls(HALF, rows=4, center=50.0, photons=1e4)
    nothing = find_center(p.copy(data=np.random.default_rng(0).normal(0, 0.01, p.shape)))
    assert np.isnan(float(nothing.center)) and nothing.attrs["rows_failed"] == 4 and "not found" in flags(nothing)[0]
    with pytest.raises(BattError, match="center is NaN"): reconstruct(p, nothing.center)
    assert np.isnan(float(find_center(balls(np.linspace(-10, 10, 21), rows=4, photons=1e4)).center))
    gap = p.copy(deep=True)
    gap[3, 1, 5] = np.nan
    part = find_center(gap)
    assert abs(float(part.center) - 50) < 0.2 and np.isnan(part.center_row[1]) and "NaN" in part.reason
    with pytest.raises(BattError, match="half a turn"): find_center(p, method="opposite")
    with pytest.raises(BattError, match="x is missing"): find_center(p.rename(x="u"))


def test_center_sigma_knows_wrong_angles():
    true = np.linspace(0, 180, 91)[:-1]
    p = balls(true*0.985, rows=4, center=50.0, photons=1e6) # a stage that turned 1.5 % less than it said
    found = find_center(p.assign_coords(angle=true))
    right = find_center(balls(true, rows=4, center=50.0, photons=1e6))
    assert float(right.center_sigma) < 0.02 and float(found.center_sigma) > 5*float(right.center_sigma)
    assert abs(float(found.center) - 50) < 3*float(found.center_sigma)


def test_center_reports_motion():
    for rms in (0.0, 0.5, 1.5):
        found = find_center(balls(HALF, rows=6, center=49 + rms*np.random.default_rng(12).normal(size=90), photons=1e4).expand_dims(time=2))
        assert found.motion_x.dims == ("time",) and (np.abs(found.motion_x - rms) < 0.2*rms + 0.08).all()
        assert ("moved sideways" in "".join(flags(found))) == (rms > 0.3)
    assert np.isnan(float(find_center(balls(HALF, rows=1, photons=1e4)).motion_x))


def unseen(error, angles): # without what is the same as a sample that stands elsewhere
    d = np.stack([np.ones(len(angles)), np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))], -1)
    return error - d @ np.linalg.lstsq(d, error, rcond=None)[0]


@pytest.mark.parametrize("seed", [1, 2])
def test_alignment_finds_jitter(seed):
    mx, mz = np.random.default_rng([10, seed]).normal(0, 1.2, (2, len(HALF)))
    p = balls(HALF, seed, rows=24, center=50 + mx, dz=mz, photons=1e4)
    before = p.copy(deep=True)
    found = align_projections(p)
    ex, ez = unseen(found.shift_x.values - mx, HALF), (found.shift_z - found.shift_z.mean()).values - (mz - mz.mean())
    for e, s in ((ex, found.shift_x_sigma), (ez, found.shift_z_sigma)):
        assert e.std() < 0.06 and 0.3 < np.sqrt(np.mean((e/s.values)**2)) < 1.8
    assert abs(float(found.axis) - 50 - mx.mean()) < 0.5 and "moved during the scan" in flags(found)[0] and found.attrs["failed"] == 0
    want, got = reconstruct(balls(HALF, seed, rows=24)), reconstruct(found.projections, found.center)
    assert float(((got - want)[8:16]**2).mean()) < 0.5*float(((reconstruct(p, 50.0) - want)[8:16]**2).mean())
    xr.testing.assert_identical(p, before)


def test_alignment_of_the_twins_motion_of_one_row_and_of_nothing():
    still = balls(HALF, 3, rows=24, photons=1e4)
    none = align_projections(still, iterations=6)
    assert unseen(none.shift_x.values, HALF).std() < 1.5*float(none.shift_x_sigma.median()) and float(none.shift_z.std()) < 2*float(none.shift_z_sigma.median())
    crept = scan_motion(balls(HALF, 3, rows=24), seed=2)
    found = align_projections(crept.drop_vars(["true_motion_x", "true_motion_z"]), iterations=6)
    assert np.abs(unseen(found.shift_x.values - crept.true_motion_x.values/PIXEL, HALF)).max() < 0.1
    mx = np.random.default_rng(11).normal(0, 1.0, len(HALF))
    row = align_projections(balls(HALF, 4, rows=1, center=48 + mx, photons=1e5)[:, 0])
    assert unseen(row.shift_x.values - mx, HALF).std() < 0.1 and row.projections.dims == ("angle", "x")


def test_alignment_gives_up_what_it_cannot():
    p = balls(HALF, 5, rows=16, photons=1e4)
    p[40] = np.random.default_rng(0).normal(0, 0.01, p[40].shape) # the beam came through without a sample
    found = align_projections(p, iterations=4)
    assert found.attrs["failed"] == 1 and np.isnan(found.shift_x[40]) and np.isnan(found.projections[40]).all() and np.isfinite(found.shift_x).sum() == 89
    with pytest.raises(BattError, match="one scan"): align_projections(xr.concat([p, p], "time"))
    with pytest.raises(BattError, match="NaN"): align_projections(p.where(p.z > 1))


def test_phase_of_a_propagated_ball():
    mesh, keV, far = 0.5, 20.0, 30.0
    u = (np.arange(160) - 80)*mesh
    true = 2*np.sqrt(np.maximum(18.0**2 - np.add.outer(u**2, (u - 5)**2), 0))
    mu, d = attenuation("LFP", keV, 1.0), delta("LFP", keV, 1.0)
    line = xr.DataArray(true[None]*mu, {"angle": [0.0], "z": u, "x": u}, ("angle", "z", "x"), "line_integral", {"pixel_size_um": mesh})
    image = propagate(line, line/mu*d, keV, far)
    found = retrieve_phase(image.assign_attrs(pixel_size_um=mesh), delta=d, mu=mu, thickness=True, distance_mm=far)
    assert found.units == "µm" and np.sqrt(np.mean((found.values[0] - true)[true > 6]**2)) < 0.5 and np.abs(found.values[0] - true)[true > 20].max() < 0.02*36
    assert np.sqrt(np.mean(found.values[0][true == 0]**2)) < 0.5 and np.sqrt(np.mean((-np.log(image.values[0])/mu - true)[true > 6]**2)) > 5
    ratio = d/(mu*12.39841984e-4/keV/4/np.pi)
    same = retrieve_phase(image, delta_beta=ratio, energy_keV=keV, distance_mm=far, pixel_um=mesh)
    assert np.allclose(same.values, found.values*mu, atol=1e-5)
    assert np.allclose(retrieve_phase(image, delta=0.0, mu=mu, distance_mm=far, pixel_um=mesh), -np.log(image), atol=1e-5)
    with pytest.raises(BattError, match="delta_beta"): retrieve_phase(image, distance_mm=far, pixel_um=mesh)
    with pytest.raises(BattError, match="no rows"): retrieve_phase(image[:, 0], delta=d, mu=mu, distance_mm=far)


def test_the_twins_scan_to_the_attenuation_of_its_material():
    n = 96
    z, y, x = np.meshgrid(np.arange(12), *[np.arange(n) - n//2]*2, indexing="ij")
    labels = np.zeros(z.shape, np.uint8)
    for k, (cy, cx) in enumerate(((0, 0), (22, 8), (-20, 14), (-4, -25))): labels[np.hypot(y - cy, x - cx) < 8 + k] = 1
    coords = {"z": PIXEL*np.arange(12), "y": PIXEL*np.arange(n), "x": PIXEL*np.arange(n)}
    labels = xr.DataArray(labels, coords, ("z", "y", "x"))
    lithium = xr.where(labels == 1, 0.6, np.nan)
    scan = expose(radiograph(labels, lithium, "NMC811", 25.0, np.linspace(0, 180, 180, endpoint=False)), seed=4)
    lines = correct_flat(scan)
    found = find_center(lines)
    assert abs(float(found.center) - 48) < max(4*float(found.center_sigma), 0.1)
    volume = reconstruct(lines, found.center, filter_name="hann")
    core = np.zeros((n, n), bool)
    for k, (cy, cx) in enumerate(((0, 0), (22, 8), (-20, 14), (-4, -25))): core |= np.hypot(y[0] - cy, x[0] - cx) < 5 + k
    assert abs(float(volume.values[:, core].mean())/float(attenuation("NMC811", 25.0, 0.6)) - 1) < 0.05


@pytest.mark.parametrize("bad, words", [(dict(method="art"), "fbp, sirt, cgls"), (dict(filter_name="x"), "no filter"), (dict(pad="wrap"), "zero, edge"), (dict(center=500.0), "beside"), (dict(pixel_um=-1.0), "above 0")])
def test_reconstruct_says_what_is_wrong(bad, words):
    with pytest.raises(BattError, match=words): reconstruct(balls(HALF, rows=1), **bad)


def test_reconstruct_refuses_holes_and_no_scan():
    p = balls(HALF, rows=1)
    with pytest.raises(BattError, match="NaN"): reconstruct(p.where(p.angle > 3))
    with pytest.raises(BattError, match="angles"): reconstruct(p.assign_coords(angle=np.where(HALF < 2, np.nan, HALF)))
    with pytest.raises(BattError, match="angle"): reconstruct(p.drop_vars("angle"))
    with pytest.raises(BattError, match="DataArray"): reconstruct(p.to_dataset())


@needs_data
def test_the_tooth_from_file_to_volume():
    from batt_nb.campaign import read
    raw = read(DATA/"sinograms"/"tooth.h5")
    flat, dark = raw.flats.mean("flat"), raw.darks.mean("dark")
    tooth = -np.log(((raw.projections - dark)/(flat - dark)).clip(min=1e-3)).rename("line_integral").assign_attrs(raw.attrs)
    found = find_center(tooth)
    assert abs(float(found.center) - 295.8) < 0.3 and 0.03 < float(found.center_sigma) < 0.3
    volume = reconstruct(tooth, found.center, filter_name="hann")
    assert dict(volume.sizes) == {"z": 2, "y": 640, "x": 640} and volume.units == "1/pixel"
    variation = [float(np.hypot(*np.gradient(reconstruct(tooth[:, 0], c, filter_name="hann").values)).sum()) for c in (294.3, float(found.center), 297.3)]
    assert variation[1] < min(variation[0], variation[2])


def rms(a): return float(np.sqrt(np.mean(np.square(np.asarray(a, float)))))


def tilted(tilt, seed, n=96, rows=64, center=46.6, photons=5e4):
    """Balls in a pin on a detector that is turned by `tilt` degrees about the axis in its middle row: line integrals of 90 angles over half a turn."""
    rng, th, lean, p = np.random.default_rng([8, seed]), np.deg2rad(HALF)[:, None, None], np.deg2rad(tilt), 0.0
    some = [(rng.uniform(0.04, 0.09)*n, rng.uniform(0, 2*np.pi), 0.3*n*np.sqrt(rng.uniform()), rng.uniform(-rows/2, rows/2), rng.uniform(0.004, 0.012)) for _ in range(20)]
    for part in (-1/3, 0, 1/3): # mean of three points across a pixel
        u, z = np.arange(n)[None] - center + part, np.arange(rows)[:, None] - (rows - 1)/2
        u, z = u*np.cos(lean) - z*np.sin(lean), u*np.sin(lean) + z*np.cos(lean)
        p = p + 0.003*np.sqrt(np.maximum((0.4*n)**2 - u**2, 0))/3 + np.zeros((len(HALF), 1, 1))
        for r, a, d, bz, m in some: p += 2/3*m*np.sqrt(np.maximum(r**2 - (u - d*np.cos(a + th))**2 - (z - bz)**2, 0))
    if photons: p = -np.log(rng.poisson(photons*np.exp(-p))/photons)
    return xr.DataArray(p, {"angle": HALF, "z": PIXEL*np.arange(rows), "x": PIXEL*np.arange(n)}, ("angle", "z", "x"), "line_integral", {"units": "1", "pixel_size_um": PIXEL})


def test_a_tilted_axis_is_found_and_put_upright():
    error, sigma = [], []
    for seed, tilt in ((1, 0.3), (3, -0.3)):
        f = find_center(tilted(tilt, seed))
        error.append(float(f.tilt) - tilt); sigma.append(float(f.tilt_sigma))
        assert abs(float(f.center) - 46.6) < 0.1
    z = np.array(error)/sigma
    assert np.abs(z).max() < 2.5 and np.sqrt(np.mean(z**2)) < 1.8 and max(sigma) < 0.06
    small = dict(n=72, rows=48, center=35.2)
    p, want = tilted(1.5, 4, **small), reconstruct(tilted(0.0, 4, photons=None, **small), 35.2)
    f = find_center(p)
    assert "tilted" in flags(f)[0]
    up = correct_tilt(p, f)
    off = lambda image: float(np.sqrt(((image - want)**2)[4:-4, 8:-8, 8:-8].mean()))
    rows = reconstruct(p, float(f.center) + xr.DataArray(np.tan(np.deg2rad(float(f.tilt)))*(np.arange(48) - 23.5), dims="z"))
    assert off(reconstruct(up, up.center)) < 0.85*min(off(reconstruct(p, float(f.center))), off(rows))
    assert off(reconstruct(up, up.center)) < 1.1*off(reconstruct(tilted(0.0, 4, **small), 35.2))
    assert up.dims == p.dims and up.tilt_deg == float(f.tilt) and history(up)[-1]["function"] == "cleaning.scan_geometry.correct_tilt"


def test_no_tilt_no_change_and_the_stated_harm():
    changed = 0
    for seed in (5,):
        p = tilted(0.0, seed)
        f = find_center(p)
        same = correct_tilt(p, f)
        changed += same.tilt_deg != 0
        assert abs(float(f.tilt)) < 3*float(f.tilt_sigma) and rms(same - p) <= same.tilt_harm
    assert not changed
    clean, want = tilted(1.0, 8, photons=None), tilted(0.0, 8, photons=None)
    up = correct_tilt(clean, find_center(clean))
    off = (up - want).isel(z=slice(3, -3), x=slice(3, -3)) # what turned in from beside the detector is not known
    assert 0.2*up.tilt_harm < rms(off) < up.tilt_harm < 0.2*rms((clean - want).isel(z=slice(3, -3), x=slice(3, -3))) + 0.005


def test_tilt_with_dask_rows_called_y_and_errors():
    p = tilted(0.8, 9, n=72, rows=48, center=35.2).astype(np.float32)
    f = find_center(p.chunk(angle=30))
    assert abs(float(f.tilt) - float(find_center(p).tilt)) < 1e-6
    lazy = correct_tilt(p.chunk(angle=30), f)
    assert lazy.chunks is not None
    np.testing.assert_allclose(lazy.values, correct_tilt(p, f).values, atol=1e-6)
    assert correct_tilt(p.rename(z="y"), f).dims == ("angle", "y", "x")
    assert np.isnan(float(find_center(p.isel(z=slice(0, 3))).tilt))
    with pytest.raises(BattError, match="NaN"): correct_tilt(p, find_center(p.isel(z=slice(0, 3))))
    with pytest.raises(BattError, match="one scan"): correct_tilt(p.isel(z=0), f)
    two = find_center(xr.concat([p, tilted(0.0, 9, n=72, rows=48, center=35.2).astype(np.float32)], "time"))
    assert two.tilt.dims == ("time",) and abs(float(two.tilt[0]) - 0.8) < 0.15 and abs(float(two.tilt[1])) < 0.15
