"""Registration against known drift, and what it says where there is none to be known."""

import numpy as np
import pytest
import xarray as xr

from batt_nb.cleaning.registration import apply_shift, register
from batt_nb.cleaning.warps import displacement
from batt_nb.core import BattError, history
from conftest import DATA, needs_data
from scipy.ndimage import gaussian_filter

MARGIN = 24


pytestmark = pytest.mark.usefixtures("one_thread")


def grains(seed, n):
    """Two phases and pores with sharp borders and some texture, drawn twice as fine as the pixels (periodic, 2n x 2n)."""
    r = np.random.default_rng([31, seed])
    a, b = (gaussian_filter(r.normal(size=(2*n, 2*n)), s, mode="wrap") for s in (11, 5))
    return gaussian_filter(1.0*(a > 0.3*a.std()) + 0.5*(b > b.std()) + 0.02*r.normal(size=a.shape), 1.4, mode="wrap")


def spheres(seed, n):
    """The thickness of a heap of spheres (periodic, 2n x 2n)."""
    r, side = np.random.default_rng([32, seed]), np.arange(2*n)
    image = np.zeros((2*n, 2*n))
    for _ in range(int(70*(n/256)**2) + 12):
        (cy, cx), radius = r.uniform(0, 2*n, 2), r.uniform(8, 40)
        dy, dx = ((side - c + n) % (2*n) - n for c in (cy, cx))
        image += r.uniform(.4, 1)*np.sqrt(np.clip(radius**2 - dy[:, None]**2 - dx**2, 0, None))
    return gaussian_filter(image, 1.6, mode="wrap")/20


def frames_of(image, shifts, noise=0.0, seed=0, change=lambda a: a, dim="frame"):
    """Cut from a larger image after it was moved: real borders. The first frame is the image itself, not changed in contrast."""
    n = len(image)//2
    spectrum = np.fft.rfft2(change(image))
    ky, kx = np.fft.fftfreq(2*n)[:, None], np.fft.rfftfreq(2*n)
    cut = lambda a: a.reshape(n, 2, n, 2).mean((1, 3))[MARGIN:-MARGIN, MARGIN:-MARGIN]
    out = [cut(image), *(cut(np.fft.irfft2(spectrum*np.exp(-4j*np.pi*(ky*dy + kx*dx)), s=image.shape)) for dy, dx in shifts)]
    out = np.stack(out)
    out = out + noise*image.std()*np.random.default_rng([33, seed]).normal(size=out.shape)
    side = 0.1*np.arange(n - 2*MARGIN)
    return xr.DataArray(out.astype(np.float32), {dim: np.arange(len(out))*1.0, "y": side, "x": side}, (dim, "y", "x"), "optical_depth", {"units": "1"})


def draw(seed, n, reach=8): return np.random.default_rng([34, seed]).uniform(-reach, reach, (n, 2))


@pytest.fixture(scope="module")
def moved(): return frames_of(grains(1, 176), draw(1, 5), 0.3, 1), draw(1, 5)


CHANGES = {"same": lambda a: a, "inverted": lambda a: 2 - 0.7*a, "folded": lambda a: 0.7*(a - 1.5*(a - np.median(a))*(a > np.median(a)))}


@pytest.mark.parametrize("contrast", CHANGES)
@pytest.mark.parametrize(("noise", "most"), [(0.0, 0.03), (0.3, 0.15)])
def test_shift_is_found_whatever_the_contrast(contrast, noise, most):
    true = draw(7, 4)
    found = register(frames_of(grains(3, 176), true, noise, 2, CHANGES[contrast]))
    error = np.abs(found["shift"].values[1:] - true)
    assert found.attrs["failed"] == 0 and error.max() < (most if contrast != "folded" else max(most, 0.1)) # where half of an edge turns, its middle moves
    assert (error < 4.5*found.shift_sigma.values[1:]).all()


def test_sigma_holds_its_95_percent():
    inside, failed = [], 0
    for seed in range(24):
        image, true, noise = (grains, spheres)[seed % 2](100 + seed, 144), draw(100 + seed, 6), (0.15, 0.4, 1.0)[seed % 3]
        for k in range(0, 6, 3): # each pair of frames has a reference of its own
            found = register(frames_of(image, true[k:k + 3], noise, 1000*seed + k))
            failed += found.attrs["failed"]
            z = ((found["shift"].values[1:] - true[k:k + 3])/found.shift_sigma.values[1:]).ravel()
            inside += list(np.abs(z[np.isfinite(z)]) < 1.96)
    assert len(inside) > 250 and failed < 16 # at a noise of 1.0 one frame in five is too weak
    assert 0.92 < np.mean(inside) < 0.985 # of 288, so give or take 1.3 %


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.15, 0.4, 1.0])
def test_sigma_at_each_noise(noise):
    inside = []
    for seed in range(60):
        image, true = (grains, spheres)[seed % 2](300 + seed, 144), draw(300 + seed, 6)
        for k in range(6):
            found = register(frames_of(image, true[k:k + 1], noise, 1000*seed + k))
            z = (found["shift"].values[1] - true[k])/found.shift_sigma.values[1]
            inside += list(np.abs(z[np.isfinite(z)]) < 1.96)
    assert 0.93 < np.mean(inside) < 0.985


def test_what_cannot_be_registered_is_masked_and_counted(moved):
    stack, true = moved
    bad = stack.copy(deep=True)
    bad[1] = frames_of(grains(2, 176), [])[0]
    bad[2] = 7.0
    bad[3] = np.nan
    bad[4] = np.random.default_rng(1).normal(size=bad.shape[1:])
    found = register(bad)
    assert found.converged.values.tolist() == [True, False, False, False, False, True] and found.attrs["failed"] == 4
    assert np.isnan(found["shift"].values[1:5]).all() and np.isnan(found.shift_sigma.values[1:5]).all()
    placed = apply_shift(bad, found)
    assert np.isnan(placed[1:5]).all() and np.isfinite(placed[5, 40:-40, 40:-40]).all() and placed.attrs["not_shifted"] == 4
    assert register(stack, max_shift=3.0).converged.values.tolist() == [True, *(np.abs(true).max(1) < 3.5)]


def test_more_and_more_noise_fails_and_never_lies():
    image, wrong, kept = grains(5, 112), 0, []
    for noise in (1, 2, 4, 8):
        true = draw(noise, 12)
        found = register(frames_of(image, true, noise, noise))
        off = np.abs(found["shift"].values[1:] - true)
        wrong += int(np.nansum(off > 5*found.shift_sigma.values[1:]))
        kept.append(13 - found.attrs["failed"])
    assert wrong == 0 and kept[0] > 9 and kept[-1] == 1


def test_a_grating_is_ambiguous():
    wave = np.sin(np.arange(128)*2*np.pi/8) + np.sin(np.arange(128)*2*np.pi/8)[:, None]
    stack = xr.DataArray(np.repeat(wave[None], 3, 0), {"frame": range(3), "y": np.arange(128.0), "x": np.arange(128.0)}, ("frame", "y", "x"))
    assert register(stack).attrs["failed"] == 2


@pytest.mark.parametrize("dim", ["time", "energy", "angle", "frame"])
def test_any_leading_dimension_and_dask(moved, dim):
    stack = moved[0].rename(frame=dim)
    before = stack.copy(deep=True)
    lazy = stack.chunk({dim: 2, "y": 64, "x": -1})
    found, chunked = register(stack), register(lazy)
    assert found["shift"].dims == (dim, "axis") and found["shift"].attrs["units"] == "px" and float(found.pixel_size[0]) == pytest.approx(0.1)
    np.testing.assert_allclose(chunked["shift"], found["shift"], atol=1e-6)
    placed, later = apply_shift(stack, found), apply_shift(lazy, found)
    assert later.chunks is not None and not isinstance(later.data, np.ndarray)
    np.testing.assert_allclose(later.values, placed.values, atol=1e-6)
    xr.testing.assert_identical(stack, before)
    assert placed.dims == stack.dims and placed.attrs["units"] == "1" and placed.name == stack.name
    assert [e["function"] for e in history(placed)] == ["cleaning.registration.register", "cleaning.registration.apply_shift"]


def test_one_interpolation_brings_the_frames_into_place():
    true = draw(3, 3)
    stack = frames_of(spheres(3, 176), true)
    placed = apply_shift(stack, register(stack))
    inner = placed[:, 12:-12, 12:-12]
    assert float(np.abs(inner - inner[0]).max()) < 0.02*float(stack.std())
    assert np.isnan(placed[1]).any()
    with pytest.raises(BattError, match="shifted before"): apply_shift(placed, register(stack))


def test_whole_pixels_are_moved_and_not_interpolated():
    stack = frames_of(grains(4, 112), [], 0.5)[[0, 0]].copy(deep=True)
    stack[1] = np.roll(stack.values[0], (3, -2), (0, 1))
    found = register(stack)
    found["shift"].values[1] = (3, -2)
    placed = apply_shift(stack, found).values
    np.testing.assert_allclose(placed[1, :-3, 2:], stack.values[0, :-3, 2:], atol=2e-6)
    assert np.isnan(placed[1, -3:]).all() and np.isnan(placed[1, :, :2]).all()


@pytest.mark.parametrize("reference", ["first", "mean", "previous", 2])
def test_references(reference):
    walk = np.cumsum(np.random.default_rng(5).normal(0, 0.8, (8, 2)), 0)
    found = register(frames_of(grains(6, 144), walk, 0.3, 4), reference=reference)
    true = np.vstack([[0, 0], walk])
    true = true - (true.mean(0) if reference == "mean" else true[2] if reference == 2 else 0)
    error = np.abs(found["shift"].values - true)
    assert found.attrs["failed"] == 0 and error.max() < 0.12
    assert np.sqrt(np.mean((error[found.shift_sigma > 0]/found.shift_sigma.values[found.shift_sigma > 0])**2)) < 1.7


def test_a_moving_front_is_not_a_drift():
    from batt_nb.twin.cells import lithium_map, make_cell
    cell = make_cell("LFP", size=(16, 96, 96), rate=1.0, seed=7)
    lithium, thickness = lithium_map(cell, np.linspace(60, 0.95*cell.duration, 8))
    thickness = thickness.squeeze(drop=True)
    seen = (thickness*(0.4 + 0.6*lithium.fillna(0))).transpose("time", "y", "x").astype(float)
    seen = seen + 0.05*float(seen.std())*np.random.default_rng(2).normal(size=seen.shape)
    for reference in ("first", "previous", "mean"):
        found = register(seen, reference=reference)
        assert found.attrs["failed"] == 0 and float(np.abs(found["shift"]).max()) < 0.5


def fronted(seed, moves, n=128, noise=0.04):
    """One ball, drawn twice as fine, with a step of contrast inside that moves by `moves` (px) or turns its sign (None), while the ball itself moves by d."""
    r, side = np.random.default_rng([36, seed]), np.arange(2*n) - n
    d, angle, radius, at = r.uniform(-4, 4, 2), r.uniform(0, 2*np.pi), r.uniform(.55, .7)*n, r.uniform(-.2, .2)*n
    out = []
    for k in (0, 1):
        y, x = side[:, None] - 2*k*d[0], side[None] - 2*k*d[1]
        ball = np.sqrt(np.clip(1 - (y**2 + x**2)/radius**2, 0, None))
        along = np.cos(angle)*y + np.sin(angle)*x + 0.1*radius*np.sin(4*(np.cos(angle)*x - np.sin(angle)*y)/radius)
        step = np.tanh((along - at - 2*k*(moves or 0))/1.5)*(-1 if k and moves is None else 1)
        out.append(gaussian_filter(ball*(1 + 0.5*step), 1.5).reshape(n, 2, n, 2).mean((1, 3)))
    out = np.stack(out)
    out += noise*out[0].std()*r.normal(size=out.shape)
    return xr.DataArray(out, {"frame": [0, 1], "y": 0.1*np.arange(n), "x": 0.1*np.arange(n)}, ("frame", "y", "x"), "optical_depth"), d


def silent(cases):
    """Frames that are off by more than three sigma + 0.05 px without saying so, frames not registered, and all errors."""
    off, lost, errors = 0, 0, []
    for stack, d in cases:
        found = register(stack).isel(frame=1)
        error, sigma = np.abs(found["shift"].values - d), found.shift_sigma.values
        lost += not bool(found.converged)
        off += bool((error > 3*sigma + .05).any())
        errors.append(error.max())
    return off, lost, np.array(errors)


def test_a_front_in_the_one_particle_is_not_followed():
    off, lost, errors = silent(fronted(seed, (2.0, -3.0, 6.0, None)[seed % 4]) for seed in range(6))
    assert off == 0 and lost <= 1 and np.nanmax(errors) < 0.2 # the sum over the picture followed 5 of the 6 by 1.5 to 5.5 px


@pytest.mark.slow
def test_few_fronts_are_followed_unsaid():
    off, lost, _ = silent(fronted(seed, (2.0, -3.0, 6.0, -10.0, None)[seed % 5], noise=(0.02, 0.1)[seed % 2]) for seed in range(1000, 1060)) # a front that moves by 1 px alone is not told from its outline, see the notebook's limits
    assert off <= 3 and lost < 16 # 2 and 11 of 60 when this was written


def test_two_answers_that_are_as_good_are_none():
    """Half of the picture moves one way, half the other: which of them is the sample cannot be known."""
    image, frames = gaussian_filter(np.random.default_rng(1).normal(size=(160, 160)), 2.5), []
    for a, b in ((0, 0), (4, -4)): frames.append(np.hstack([np.roll(image, a, 0)[16:-16, :64], np.roll(image, b, 0)[16:-16, 64:128]]))
    stack = xr.DataArray(np.stack(frames), {"frame": [0, 1], "y": np.arange(128.0), "x": np.arange(128.0)}, ("frame", "y", "x"))
    assert register(stack).converged.values.tolist() == [True, False]


def test_missing_pixels_cost_their_area(moved):
    stack, true = moved
    holed = stack.copy(deep=True)
    holed[2, 20:70, 30:100] = np.nan
    found, whole = register(holed), register(stack)
    assert found.attrs["failed"] == 0 and np.abs(found["shift"].values[2] - true[1]).max() < 0.15
    assert (found.shift_sigma[2] > 0.9*whole.shift_sigma[2]).all()


def test_bin_gives_pixels_of_the_frames():
    true = draw(9, 2)
    stack = frames_of(grains(8, 304), true, 0.3, 1)
    one, two = register(stack, bin=1), register(stack, bin=2)
    assert np.abs(one["shift"].values[1:] - true).max() < 0.06 and np.abs(two["shift"].values[1:] - true).max() < 0.08


def warped(model_noise, u, seed=0):
    """The spheres of one heap drawn where the warp puts them: a reference and a frame (160 x 160); u maps pixels of the frame into the reference."""
    r = np.random.default_rng([35, seed])
    centers, radii, weights = r.uniform(-15, 175, (70, 2)), r.uniform(5, 20, 70), r.uniform(.4, 1, 70)
    grid = np.stack(np.meshgrid(np.arange(160.0), np.arange(160.0), indexing="ij"))
    out = []
    for place in (grid, u(grid)):
        image = np.zeros((160, 160))
        for c, radius, w in zip(centers, radii, weights, strict=True):
            d = np.hypot(place[0] - c[0], place[1] - c[1])
            image += w*np.sqrt(np.clip(radius**2 - d**2, 0, None))/(1 + np.exp(np.clip((d - radius)/0.7 + 2, -50, 50)))
        out.append(image + model_noise*r.normal(size=image.shape))
    return xr.DataArray(np.stack(out), {"time": [0.0, 60.0], "y": np.arange(160)*0.5, "x": np.arange(160)*0.5}, ("time", "y", "x"), "thickness", {"units": "µm"})


def linear(matrix, d):
    back = np.linalg.inv(matrix)
    return lambda grid: np.einsum("ij,jyx->iyx", back, grid - 79.5 - np.reshape(d, (2, 1, 1))) + 79.5


@pytest.mark.parametrize("angle", [0.0, 1.3, -3.7])
def test_rotation(angle):
    a, d = np.deg2rad(angle), (3.2, -5.1)
    stack = warped(0.7, linear(np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]), d))
    found = register(stack, model="rigid")
    off = float(found.rotation[1]) - angle
    assert found.attrs["failed"] == 0 and abs(off) < 0.06 and abs(off) < 4.5*float(found.rotation_sigma[1])
    assert np.abs(found["shift"].values[1] - d).max() < 0.12
    placed = apply_shift(stack, found)[:, 25:-25, 25:-25]
    assert float(np.abs(placed[1] - placed[0]).mean()) < 0.35*float(np.abs(stack[1] - stack[0])[25:-25, 25:-25].mean())


def test_affine_and_dask():
    matrix = np.array([[1.015, -0.01], [0.02, 0.99]])
    stack = warped(0.7, linear(matrix, (2.0, 1.5)), 1)
    found = register(stack, model="affine")
    off = np.abs(found.matrix.values[1] - matrix)
    assert found.attrs["failed"] == 0 and off.max() < 2.5e-3 and (off < 4.5*found.matrix_sigma.values[1]).all()
    lazy = apply_shift(stack.chunk({"time": 1}), found)
    assert lazy.chunks is not None
    np.testing.assert_allclose(lazy.values, apply_shift(stack, found).values, atol=5e-4) # float32


def test_deformation_and_none_invented():
    bump = lambda g: np.exp(-((g[0] - 85)**2 + (g[1] - 75)**2)/(2*30.0**2))
    stack = warped(0.3, lambda g: g - 1.5*np.stack([bump(g), -0.5*bump(g)]), 2)
    found = register(stack, model="deformable", knot=20.0)
    field = displacement((160, 160), found.knot_shift.values, found.attrs["knot"])[1] + found["shift"].values[1][:, None, None]
    grid = np.stack(np.meshgrid(np.arange(160.0), np.arange(160.0), indexing="ij"))
    true = 1.5*np.stack([bump(grid + field), -0.5*bump(grid + field)]) # where the pixel went
    inner = np.s_[:, 16:-16, 16:-16]
    assert found.attrs["failed"] == 0 and np.sqrt(np.mean((field - true)[inner]**2)) < 0.15 < 0.4*np.sqrt(np.mean(true[inner]**2)) + 0.1
    same = register(warped(0.7, lambda g: g, 3), model="deformable")
    still = displacement((160, 160), same.knot_shift.values, same.attrs["knot"])[1][inner]
    assert np.sqrt(np.mean(still**2)) < 0.15


def test_a_warp_that_cannot_be_found_is_masked():
    stack = warped(0.7, lambda g: g, 4)
    stack[1] = np.random.default_rng(0).normal(size=(160, 160))
    for model in ("rigid", "affine", "deformable"):
        found = register(stack, model=model)
        assert found.converged.values.tolist() == [True, False] and found.attrs["failed"] == 1
        assert np.isnan(apply_shift(stack, found)[1]).all()
    with pytest.raises(BattError, match="previous frames"): register(stack, model="rigid", reference="previous")


def test_what_is_refused(moved):
    stack = moved[0]
    with pytest.raises(BattError, match="pixel size"): register(stack.drop_vars("y"))
    with pytest.raises(BattError, match="no model"): register(stack, model="projective")
    with pytest.raises(BattError, match="not known"): register(stack, reference="last")
    with pytest.raises(BattError, match="stack of frames"): register(stack.expand_dims("energy"))
    with pytest.raises(BattError, match="too small"): register(stack[:, :20, :20])
    with pytest.raises(BattError, match="the shifts are for"): apply_shift(stack[:3], register(stack))


@needs_data
def test_nca_across_the_edge():
    from batt_nb.campaign.zeiss import read_zeiss
    depth = []
    for energy, flat in (("08324.0", "000051"), ("08354.0", "000351")):
        name = f"20161456_ssrl-test-data_{energy}_eV_001of"
        sample, empty = (read_zeiss(DATA/"xas/txm-nca"/f"rep01_{n}.xrm").image for n in (f"{name}003", f"{flat}_ref_{name}010"))
        depth.append(-np.log(sample.clip(1)/empty.clip(1)).astype(np.float32))
    stack = xr.concat(depth, "energy").assign_coords(energy=[8324.0, 8354.0])
    found, back = register(stack), register(stack, reference=1)
    assert found.attrs["failed"] == 0 and np.abs(found["shift"].values[1] - (20.3, 9.6)).max() < 0.6
    assert np.abs(found["shift"].values[1] + back["shift"].values[0]).max() < 0.6


@needs_data
def test_magnification_of_a_zone_plate():
    from batt_nb.campaign.zeiss import read_zeiss
    depth = []
    for energy, flat in (("08324.0", "000051"), ("08354.0", "000351")):
        name = f"20161456_ssrl-test-data_{energy}_eV_001of"
        sample, empty = (read_zeiss(DATA/"xas/txm-nca"/f"rep01_{n}.xrm").image for n in (f"{name}003", f"{flat}_ref_{name}010"))
        depth.append(-np.log(sample.clip(1)/empty.clip(1)).astype(np.float32))
    stack = xr.concat(depth, "energy").assign_coords(energy=[8324.0, 8354.0]).coarsen(y=4, x=4).mean()
    found = register(stack, model="affine")
    np.testing.assert_allclose(np.diag(found.matrix.values[1]), 8324/8354, atol=3e-3)


def test_rotation_against_the_mean():
    a = np.deg2rad(2.0)
    two = warped(0.5, linear(np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]), (2.0, 1.0)))
    stack = xr.concat([two, two[:1].assign_coords(time=[120.0])], "time")
    found = register(stack, reference="mean", model="rigid")
    assert found.attrs["failed"] == 0 and abs(float(found.rotation[1] - found.rotation[0]) - 2.0) < 0.25
