"""Numbers of a segmented volume against cases with a known answer, TauFactor, and intervals that cover."""
import numpy as np
import pytest
import xarray as xr
from scipy import ndimage

pytest.importorskip("skimage")

from batt_nb.cleaning.morphology import crack_share, directions, draw_volumes, effective_transport, interface_areas, microstructure, particles
from batt_nb.core import BattError, flags, history
from conftest import DATA, needs_data, oracle


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(1): yield


def ball(n, r, at=None):
    at = [n/2 - .5]*3 if at is None else at
    return sum((np.arange(n).reshape([-1 if k == d else 1 for k in range(3)]) - a)**2 for d, a in enumerate(at)) < r*r


def volume(values, voxel=.5):
    return xr.DataArray(values, {d: (d, (np.arange(n) + .5)*voxel, {"units": "µm"}) for d, n in zip("zyx"[-values.ndim:], values.shape)}, tuple("zyx")[-values.ndim:])


def test_layers_along_and_across():
    k = np.repeat(np.random.default_rng(0).uniform(.1, 2, 12), 2)
    across, along = np.broadcast_to(k[:, None, None], (24, 4, 5)), np.broadcast_to(k, (4, 5, 24))
    assert effective_transport(across)[0] == pytest.approx(1/np.mean(1/k), rel=1e-6)
    assert effective_transport(along)[0] == pytest.approx(k.mean(), rel=1e-6) == pytest.approx(effective_transport(across, axis=2)[0], rel=1e-6)
    value, field = effective_transport(np.ones((10, 3)))
    assert value == pytest.approx(1) and np.allclose(field, 1 - (np.arange(10)[:, None] + .5)/10)


def test_what_does_not_connect_carries_nothing():
    wall = np.ones((9, 5, 5)); wall[4] = 0
    assert effective_transport(wall)[0] == 0
    dead = np.zeros((9, 5, 5)); dead[:, 2, 2] = 1; dead[:4, 0, 0] = 1; dead[3:6, 4, 4] = 1 # one way through, a dead end, an island
    value, field = effective_transport(dead)
    assert value == pytest.approx(1/25) and np.isnan(field[:, 0, 0]).all()
    found = microstructure(volume(np.where(wall > 0, 0, 1).astype("u1")), transport=0)
    assert float(found.effective_transport[0]) == 0 and np.isnan(found.tortuosity[0]) and found.attrs["not_finite"] == 1


def test_spheres_follow_maxwell():
    ratio = []
    for n in (20, 40): # the staircase of voxels costs in proportion to their size
        pores = ~ball(n, (.1*3/4/np.pi)**(1/3)*n)
        phi = 1 - pores.mean()
        ratio.append(effective_transport(pores)[0]/(2*(1 - phi)/(2 + phi)))
    assert abs(ratio[1] - 1) < .01 and 2*ratio[1] - ratio[0] == pytest.approx(1, abs=.003)


def test_bruggeman_orders_of_random_media():
    r = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(40, 40, 40)), 1.5, mode="wrap")
    taus = [(p := r < np.quantile(r, e)).mean()/effective_transport(p, tolerance=1e-4)[0] for e in (.9, .7, .5)]
    assert taus[0] < taus[1] < taus[2] and all(t >= e**-.5 - .02 for t, e in zip(taus, (.9, .7, .5))) # a random field is at least as tortuous as overlapping spheres


@needs_data
def test_tortuosity_equals_taufactor():
    tifffile = pytest.importorskip("tifffile")
    for want in oracle("xct")["tortuosity"]:
        pores = tifffile.imread(DATA/want["file"])[:64, :64, :64] == want["phase_value"]
        assert pores.mean() == pytest.approx(want["volume_fraction_of_phase_in_crop"], rel=1e-6)
        assert pores.mean()/effective_transport(pores, tolerance=1e-5)[0] == pytest.approx(want["tau"], rel=5e-4)


def test_areas():
    assert sum(w for _, w in directions(3)) == pytest.approx(1, abs=1e-5) and len({o for o, _ in directions(3)}) == 13
    for r in (8, 13):
        lattice = np.tile(ball(36, r), (2, 2, 2)).astype(int)
        assert interface_areas(lattice, 2, .5)[0, 1]*36**3*.125 == pytest.approx(4*np.pi*r*r*.25, rel=.05)
    n = np.random.default_rng(0).normal(size=(3, 3)); n /= np.linalg.norm(n, axis=1)[:, None]
    at = np.stack(np.meshgrid(*[np.arange(40) - 19.5]*3, indexing="ij"))
    for m in n: # planes of any direction: one area a unit area
        thick = (np.tensordot(m, at, 1) % 12 < 6).astype(int)
        assert interface_areas(thick, 2)[0, 1] == pytest.approx(1/6, rel=.06)
    three = np.repeat(np.arange(3), 8)[:, None, None]*np.ones((1, 24, 24), int)
    a = interface_areas(three, 3)
    assert a[0, 2] < .1*a[0, 1] and a[0, 1] == pytest.approx(a[1, 2]) and np.allclose(a, a.T)
    disks = np.tile(ball(36, 12)[18], (3, 3)).astype(int) # S_V = 4/pi L_A of a slice
    assert interface_areas(disks, 2)[0, 1] == pytest.approx(4/np.pi*2*np.pi*12/36**2, rel=.05)


def test_particles_and_their_sizes():
    r, mask, radii = np.random.default_rng(0), np.zeros((48, 48, 48), bool), []
    for z in (13, 34):
        for y in (13, 34):
            for x in (13, 34):
                radii.append(r.uniform(7, 10.4)); mask |= ball(48, radii[-1], (z, y, x))
    found = particles(mask, .5)
    assert found.sizes["particle"] == 8 and found.inside.all()
    assert np.allclose(np.sort(found.diameter), np.sort(np.array(radii)), rtol=.03) # diameter (µm) = 2 r x 0.5
    assert not particles(ball(20, 9, (0, 10, 10)), 1.).inside.any()


def test_cracks():
    for width in (1.5, 2.5):
        slab = np.abs(np.arange(40)[:, None, None]*.8 + np.arange(40)[None, :, None]*.6 - 28) < width/2
        sphere, inner = ball(40, 17), ball(40, 17 - 3.5)
        assert crack_share(sphere & ~slab, 5) == pytest.approx((slab & inner).sum()/inner.sum(), rel=.15)
    assert crack_share(ball(40, 17), 5) == 0 and np.isnan(crack_share(ball(40, 2), 5))
    assert crack_share(ball(40, 9.5, (10, 20, 20)) | ball(40, 9.5, (29, 20, 20)), 5) < .01


def test_draws_have_the_probabilities_and_hang_together():
    p = np.array([.2, .3, .5])[:, None, None, None]*np.ones((1, 12, 24, 24))
    many = np.stack(list(draw_volumes(p, 300, 1)))
    assert np.allclose([(many == k).mean() for k in range(3)], [.2, .3, .5], atol=.07) # 300 draws that are nearly one decision each
    loose = np.stack(list(draw_volumes(p, 60, 1, common=0, length=1.0)))
    assert np.allclose([(loose == k).mean() for k in range(3)], [.2, .3, .5], atol=.012)
    shares = np.array([[(v == k).mean() for k in range(3)] for v in many])
    assert (shares.std(0) > 5*np.sqrt(.2*.8/p[0].size)).all() # far from independent voxels
    assert np.array_equal(many[:2], np.stack(list(draw_volumes(p, 2, 1))))
    sure = np.eye(3)[:, :, None, None]*np.ones((1, 1, 8, 8))
    assert all((v == np.arange(3)[:, None, None]).all() for v in draw_volumes(sure, 5))


def test_intervals_cover_where_probabilities_are_right():
    "Probabilities of a blurred, shifted threshold; truth drawn from the very model that the noise describes."
    hits, n = 0, 0
    for seed in range(12):
        r = np.random.default_rng(seed)
        field = ndimage.gaussian_filter(r.normal(size=(12, 40, 40)), 3); field /= field.std()
        p1 = 1/(1 + np.exp(-8*(field - .2)))
        p = np.stack([1 - p1, p1])
        truth = next(draw_volumes(p, 1, 1000 + seed))
        found = microstructure(xr.Dataset({"probability": volume(p1).expand_dims({"class": ["a", "b"]}).copy(data=p)}), draws=12, seed=seed)
        share = (truth == 1).mean()
        hits += float(found.volume_fraction_lower[1]) < share < float(found.volume_fraction_upper[1]); n += 1
    assert hits >= 9, (hits, n)


def test_everything_of_a_prediction():
    r = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(16, 32, 32)), 2.5); r /= r.std()
    p = np.exp(-4*(r - np.array([-1., .2, 1.2])[:, None, None, None])**2); p /= p.sum(0)
    ds = xr.Dataset({"probability": xr.DataArray(p, {"class": ["pore", "binder", "NMC"], **volume(p[0]).coords}, ("class", "z", "y", "x"))})
    before = ds.copy(deep=True)
    found = microstructure(ds, draws=5, transport=["pore"], particle="NMC", crack_width=1.2)
    xr.testing.assert_identical(ds, before)
    for k in ("volume_fraction", "interface_area", "tortuosity", "effective_transport", "crack_fraction"):
        low, mid, high = (found[k + e].values for e in ("_lower", "", "_upper"))
        assert (low <= mid).all() and (mid <= high).all(), k
    assert np.allclose(found.volume_fraction, p.reshape(3, -1).mean(1)) and found.interface_area.attrs["units"] == "1/µm"
    assert float(found.tortuosity[0]) > 1 and history(found)[-1]["function"] == "cleaning.morphology.microstructure"
    xr.testing.assert_identical(found, microstructure(ds, draws=5, transport=["pore"], particle="NMC", crack_width=1.2))
    whole = microstructure(volume(p.argmax(0).astype("u1")*85)) # codes 0, 85, 170
    assert whole.phase.values.tolist() == ["0", "85", "170"] and np.isnan(whole.volume_fraction_upper).all() and "bare labels" in flags(whole)[0]


def test_errors():
    v = volume(np.zeros((4, 5, 6), "u1"))
    for call, words in ((lambda: microstructure(v.astype(float)), "integer codes"), (lambda: microstructure(v, particle=3), "no phase"), (lambda: microstructure(v.drop_vars(list("zyx"))), "voxel="),
                        (lambda: microstructure(v.assign_coords(z=v.z*2)), "cubic"), (lambda: microstructure(v.astype(int) - 1), "no label"), (lambda: microstructure(v.expand_dims(time=2)), "select a time"),
                        (lambda: microstructure(v[0], transport=0), "direction")):
        with pytest.raises(BattError, match=words): call()


def foam(seed, sharp, shape=(14, 40, 40)):
    "Labels of two phases, and probabilities of a border that is drawn elsewhere than it is: by a shift of level and a field of its own."
    r = np.random.default_rng([41, seed])
    field = ndimage.gaussian_filter(r.normal(size=shape), 2.0, mode="wrap"); field /= field.std()
    wrong = ndimage.gaussian_filter(r.normal(size=shape), 1.5, mode="wrap")
    seen = field + 0.12*wrong/wrong.std() + 0.05*r.normal()
    p1 = 1/(1 + np.exp(np.clip(-sharp*(seen - .3), -50, 50)))
    return (field > .3).astype("u1"), xr.Dataset({"probability": volume(p1).expand_dims({"class": ["pore", "solid"]}).copy(data=np.stack([1 - p1, p1]))})


def test_interval_of_a_tortuosity_covers_also_where_odds_are_too_sharp():
    hits, before, widths = [], [], []
    for seed in range(12):
        labels, ds = foam(seed, 300.0) # nearly 0 or 1 everywhere
        exact = float(microstructure(volume(labels), transport=0).tortuosity[0])
        found = microstructure(ds, transport="pore", draws=10, seed=seed)
        lo, v, hi = (float(found["tortuosity" + e][0]) for e in ("_lower", "", "_upper"))
        tau = np.array([(w == 0).mean()/effective_transport(w == 0, tolerance=1e-4)[0] for w in draw_volumes(ds.probability.values, 10, seed)])
        hits.append(lo < exact < hi); widths.append((hi - lo)/v)
        before.append(abs(np.median(tau) - exact) < 1.645*tau.std(ddof=1)*np.sqrt(1.1))
        assert v == pytest.approx(float(microstructure(volume(ds.probability.values.argmax(0).astype("u1")), transport=0).tortuosity[0]), rel=1e-3)
    assert np.mean(hits) >= .75 > np.mean(before) and np.median(widths) < .3
