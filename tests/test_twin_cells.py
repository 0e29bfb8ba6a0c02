"""The twin's hidden cells: microstructures in boxes, particles that conserve lithium, protocols that end where they should, and fields whose mean is the charge."""
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from conftest import DATA, needs_data
from hypothesis import given, settings
from hypothesis import strategies as st

from batt_nb.core import BattError
from batt_nb.twin.cells import (
    GRID,
    draw_differences,
    echem,
    find_spot,
    front,
    lithium,
    lithium_map,
    make_cell,
    phase_limits,
    profile,
    share,
    windows,
)
from batt_nb.twin.diffusion import run_half_cell, shells
from batt_nb.twin.many_particles import (
    SITES,
    TIME,
    VOLT,
    Ensemble,
    equilibrium,
    exchange,
    potential,
    run,
)
from batt_nb.twin.materials import material
from batt_nb.twin.microstructure import (
    SHAPES,
    claim,
    from_labels,
    make_microstructure,
    rank,
)
from batt_nb.twin.protocol import (
    Step,
    constant_current,
    fastest,
    make_protocol,
    titration,
)

NAMES = ("LFP", "NMC811", "graphite")
BY_NAME = pytest.mark.parametrize("name", NAMES)
QUICK = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def brief(name, rate=0.5, seconds=2400.0):
    """A rest and a part of the first half-cycle."""
    return [(1, Step("rest", seconds=600.0)), (1, Step("charge" if material(name).cathode else "discharge", rate, seconds=seconds)), (1, Step("rest", seconds=1200.0))]


def electrode(name, size=(20, 36, 36), seed=3, coarse=1.5): return make_microstructure(name, size, voxel=coarse*SHAPES[name].voxel, seed=seed)


@pytest.fixture(scope="module")
def micros(): return {n: electrode(n) for n in NAMES}


@pytest.fixture(scope="module")
def segmented():
    """A label volume with codes of its own."""
    labels = np.array([0, 255, 85])[electrode("NMC811", (18, 32, 34), seed=8).labels().values]
    return from_labels(labels, 0.4, active=255, binder=85)


@pytest.fixture(scope="module")
def cells(micros):
    """A cycle with up to a tenth of the material dead and a spot slowed six times."""
    return {n: make_cell(n, "B", seed=7, micro=micros[n], rate=0.5 if n == "graphite" else 1.0, differences=replace(draw_differences(n, 7, "B"), dead=0.1)) for n in NAMES}


@pytest.fixture(scope="module")
def of_labels(segmented):
    """Cells whose electrode is a label volume."""
    return {n: make_cell(n, "C", seed=9, micro=segmented, rate=1.0) for n in ("LFP", "NMC811")}


def boxes_of(size): return st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(lambda b: (min(b[0], b[1] - 1), max(b[0] + 1, b[1]))) for n in size))


# ------------------------------------------------------------------------------------------------------------------ microstructure
@BY_NAME
@pytest.mark.parametrize(("size", "coarse"), [((24, 40, 40), 1.5), ((17, 61, 33), 2.0)])
def test_volume_fractions_are_those_asked_for(name, size, coarse):
    for seed in (0, 1):
        labels = electrode(name, size, seed, coarse).labels().values
        assert set(np.unique(labels)) == {0, 1, 2} and labels.dtype == np.uint8
        assert [(labels == k).mean() for k in (1, 2)] == pytest.approx([SHAPES[name].active, SHAPES[name].binder], abs=0.01)
    for active in (0.3, 0.65):
        other = make_microstructure(name, size, voxel=coarse*SHAPES[name].voxel, active=active, binder=0.2)
        assert [(other.labels().values == k).mean() for k in (1, 2)] == pytest.approx([active, 0.2], abs=0.01)


@BY_NAME
def test_same_seed_same_bytes(name, micros):
    again, other = electrode(name), electrode(name, seed=4)
    assert again.labels().values.tobytes() == micros[name].labels().values.tobytes() and again.particles.identical(micros[name].particles)
    for a, b in zip(again.ranks(), micros[name].ranks(), strict=True): assert a.tobytes() == b.tobytes()
    assert (other.labels().values != again.labels().values).mean() > 0.2


@BY_NAME
@QUICK
@given(data=st.data())
def test_a_box_is_a_cut_of_the_whole(micros, name, data):
    m = micros[name]
    limits = data.draw(boxes_of(m.size))
    box, cut = dict(zip("zyx", limits, strict=True)), tuple(slice(*b) for b in limits)
    whole = m.labels()[cut]
    xr.testing.assert_identical(m.labels(**box), whole)
    for part, all_of_it in zip(m.ranks(**box), m.ranks(), strict=True): np.testing.assert_array_equal(part, all_of_it[cut])


@BY_NAME
def test_a_box_without_material(name, micros):
    """No particle reaches into a voxel of pore that lies far from all."""
    labels = micros[name].labels().values
    around = micros[name].bounds()/micros[name].voxel
    for at in np.argwhere(labels != 1):
        if not ((around[..., 1] >= at - 1) & (around[..., 0] <= at + 2)).all(1).any(): break
    box = {d: (int(k), int(k) + 1) for d, k in zip("zyx", at, strict=True)}
    particle, k = micros[name].ranks(**box)
    assert (particle == -1).all() and (k == -1).all() and np.isin(micros[name].labels(**box).values, (0, 2)).all()
    sparse = make_microstructure("NMC811", (12, 60, 60), voxel=1.3, active=0.05, seed=1)
    empty = [b for b in ((y, x) for y in range(0, 60, 6) for x in range(0, 60, 6)) if not (sparse.labels(y=(b[0], b[0] + 6), x=(b[1], b[1] + 6)).values == 1).any()]
    assert empty
    for y, x in empty: assert (sparse.ranks(y=(y, y + 6), x=(x, x + 6))[0] == -1).all()


def ranked(m):
    particle, k = m.ranks()
    return particle, k, m.counts


@pytest.mark.parametrize("name", [*NAMES, "labels"])
def test_ranks_count_the_voxels_of_each_particle(name, micros, segmented):
    m = segmented if name == "labels" else micros[name]
    particle, k, n = ranked(m)
    active = m.labels().values == 1
    np.testing.assert_array_equal(particle >= 0, active); np.testing.assert_array_equal(k >= 0, active)
    assert n.sum() == active.sum() and n.size == m.particles.sizes["particle"]
    for i, count in enumerate(n): np.testing.assert_array_equal(np.sort(k[particle == i]), np.arange(count))


@QUICK
@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 3)), min_size=1, max_size=40))
def test_rank_by_hand(voxels):
    """Ties included: what comes first in the volume comes first."""
    particle, key = (np.array(v)[:, None, None] for v in zip(*voxels, strict=True))
    k, n = rank(particle, key)
    for i, (p, q) in enumerate(voxels):
        assert k[i, 0, 0] == (-1 if p < 0 else sum(1 for j, (pp, qq) in enumerate(voxels) if pp == p and (qq, j) < (q, i)))
    assert [int(c) for c in n] == [sum(1 for p, _ in voxels if p == i) for i in range(n.size)]


@BY_NAME
def test_fronts_run_as_the_material_lets_them(name, micros):
    """NMC from the surface in; a platelet along its long axis; a flake from the rim, whatever its height (basal planes are closed)."""
    from scipy.ndimage import distance_transform_edt
    m = micros[name]
    particle, k, n = ranked(m)
    for i in np.argsort(n)[-4:]:
        at = np.argwhere(particle == i)
        u = (k[particle == i] + 0.5)/n[i]
        own = ((at + 0.5)*m.voxel - m.particles["center"].values[i])@m.particles["axes"].values[i].T
        first, last = u < 0.3, u > 0.7
        if name == "NMC811":
            reach = np.linalg.norm(own/m.particles["semi_axes"].values[i], axis=1)
            assert reach[first].min() > 0.95*reach[last].max()
        elif name == "LFP": assert own[first, 0].max() < own[last, 0].min() + 1e-9
        else:
            r = np.hypot(*(own[:, :2]/m.particles["semi_axes"].values[i, :2]).T)
            assert r[first].min() > r[last].max() - 1e-6 and np.abs(own[first, 2]).min() < 0.4*np.abs(own[:, 2]).max()
    if name == "NMC811":
        depth = distance_transform_edt(m.labels().values == 1)
        u = (k + 0.5)/n[particle]
        assert depth[(particle >= 0) & (u < 0.3)].mean() < depth[(particle >= 0) & (u > 0.7)].mean()


@pytest.mark.parametrize(("changes", "says"), [
    ({"size": (2, 30, 30)}, "take more voxels"), ({"size": (30, 30)}, "along z, y and x"), ({"voxel": -1.0}, "smaller than a particle"), ({"voxel": 0.0}, "smaller than a particle"),
    ({"active": 1.2}, "together at most 1"), ({"active": 0.0}, "together at most 1"), ({"active": 0.7, "binder": 0.4}, "together at most 1")])
def test_electrodes_that_cannot_be(changes, says):
    with pytest.raises(BattError, match=says): make_microstructure("LFP", **{"size": (24, 40, 40)} | changes)


def test_unknown_materials_and_boxes(micros, segmented):
    with pytest.raises(BattError, match="one of LFP, NMC811, graphite"): make_microstructure("LCO")
    for m in (micros["LFP"], segmented):
        for z in ((-3, 4), (5, 99), (9, 9), (9, 3)):
            for draw in (m.labels, m.ranks):
                with pytest.raises(BattError, match="one after the last"): draw(z=z)


def test_a_label_volume_is_taken_as_it_is(segmented):
    assert set(np.unique(segmented.labels().values)) == {0, 1, 2} and segmented.labels(z=(3, 7), x=(1, 9)).equals(segmented.labels()[3:7, :, 1:9])
    codes = segmented.labels().values
    again = from_labels(codes*10, 0.4, active=10, binder=20)
    np.testing.assert_array_equal(again.labels().values, codes); np.testing.assert_array_equal(again.particle, segmented.particle)
    assert (from_labels(codes, 0.4, active=1).labels().values == (codes == 1)).all()
    speck = np.zeros((9, 9, 9), int); speck[1, 1, 1] = speck[7, 7, 7] = 1
    assert from_labels(speck, 0.4, active=1).counts.sum() == 2
    for bad, says in (({"active": 9}, "give the right code"), ({"active": 1, "binder": 1}, "each its own"), ({"active": 1, "voxel": 0.0}, "edge of a voxel")):
        with pytest.raises(BattError, match=says): from_labels(codes, **{"voxel": 0.4} | bad)
    with pytest.raises(BattError, match="stack the slices"): from_labels(codes[0], 0.4, active=1)


@needs_data
def test_a_measured_electrode_becomes_a_cell():
    """The three-phase electrode of TauFactor: its lithium balances as in an electrode of our own."""
    import tifffile
    volume = tifffile.imread(DATA/"xct/microstructures/three-phase-electrode-256.tiff")[60:84, 100:148, 100:148]
    codes, n = np.unique(volume, return_counts=True)
    active = int(codes[n.argmax()])
    m = from_labels(volume, 0.4, active=active)
    np.testing.assert_array_equal(m.labels().values == 1, volume == active)
    cell = make_cell("LFP", "E", seed=2, micro=m, protocol=brief("LFP"))
    assert_mean_is_charge(cell, np.random.default_rng(0), 3)


# ------------------------------------------------------------------------------------------------------------------------ protocol
@pytest.mark.parametrize(("step", "says"), [
    ({"kind": "wait"}, "charge, discharge, hold or rest"), ({"kind": "charge", "until": 4.0}, "give it in C"), ({"kind": "charge", "rate": -0.1, "until": 4.0}, "give it in C"),
    ({"kind": "charge", "rate": float("nan"), "until": 4.0}, "give it in C"), ({"kind": "charge", "rate": float("inf"), "until": 4.0}, "positive number"), ({"kind": "charge", "rate": 0.1}, "give a voltage or a time"),
    ({"kind": "charge", "rate": 0.1, "until": float("nan")}, "positive number"), ({"kind": "discharge", "rate": 0.1, "seconds": -3.0}, "positive number"), ({"kind": "hold", "until": 4.0}, "below= or seconds="),
    ({"kind": "hold", "until": 4.0, "below": -1.0}, "positive number"), ({"kind": "rest"}, "give seconds="), ({"kind": "rest", "seconds": -5.0}, "positive number"), ({"kind": "rest", "seconds": float("nan")}, "positive number")])
def test_steps_that_make_no_sense(step, says):
    with pytest.raises(BattError, match=says) as e: Step(**step)
    assert e.value.mend and e.value.key


def test_protocols_that_make_no_sense(micros):
    for bad in ([], [Step("rest", seconds=9.0)], [(1, "rest")]):
        with pytest.raises(BattError, match=r"list of \(cycle, Step\)"): make_cell("LFP", micro=micros["LFP"], protocol=bad)
    with pytest.raises(BattError, match="CC, CCCV or GITT"): make_cell("LFP", micro=micros["LFP"], protocol="CV")
    with pytest.raises(BattError, match="one at least"): constant_current("LFP", 0.1, 0)
    with pytest.raises(BattError, match="take a lower rate"): make_cell("LFP", micro=micros["LFP"], protocol=[(1, Step("discharge", 1.0, seconds=36_000.0))]) # it is full
    with pytest.raises(BattError, match="leave some material alive"): make_cell("NMC811", micro=micros["NMC811"], differences=replace(draw_differences("NMC811", 0, "A"), dead=1.0))
    with pytest.raises(BattError, match="leave some material alive"): run("LFP", ensemble("LFP", time=np.full(4, np.inf), n=4), make_protocol("LFP"), x_start=0.96)
    with pytest.raises(BattError, match="resistance"): run("LFP", ensemble("LFP", n=4, resistance=0.0), make_protocol("LFP", "CCCV"), x_start=0.96)


def test_protocols_by_name():
    m = material("graphite")
    cccv = [s for _, s in make_protocol("graphite", "CCCV", 0.2, 2)]
    assert [s.kind for s in cccv] == ["rest"] + 2*["discharge", "rest", "charge", "hold", "rest"] and (cccv[1].until, cccv[3].until) == m.window
    assert cccv[4].until == m.window[1] and cccv[4].below == pytest.approx(0.04)
    assert [c for c, _ in constant_current("LFP", 0.1, 3)] == [1] + [c for c in (1, 2, 3) for _ in range(4)]
    assert sum(s.rate*s.seconds for _, s in titration("NMC811", 0.1) if s.rate) == pytest.approx(0.95*3600)
    assert fastest([(1, Step("rest", seconds=60.0))]) == 0.1


# ------------------------------------------------------------------------------------------------------------------ many particles
def ensemble(name, n=14, seed=0, **changes):
    """Particles of an electrode, without a microstructure."""
    rng = np.random.default_rng(seed)
    weight = rng.gamma(2, size=n)
    default = {"weight": weight/weight.sum(), "time": TIME[name]*np.exp(0.4*rng.normal(size=n)), "resistance": 40.0, "side": 0.0, "u_shift": 0.002*rng.normal(size=n)}
    return Ensemble(SITES[name], **default | changes)


SLOW = lambda *words: pytest.param(*words, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "kind", "rate", "seed"), [
    ("LFP", "CC", 1.0, 1), ("LFP", "CCCV", 0.5, 2), ("LFP", "GITT", 0.5, 3), ("graphite", "CC", 1.0, 4), ("graphite", "CCCV", 0.5, 5), ("graphite", "GITT", 0.5, 6),
    *(SLOW(n, k, r, s) for n in ("LFP", "graphite") for k in ("CC", "CCCV", "GITT") for r, s in ((0.05, 7), (0.1, 8), (0.2, 9), (0.5, 10)))])
def test_lithium_is_what_was_counted(name, kind, rate, seed):
    """x, charge and side reaction balance to rounding; steps end at their cut-offs, holds hold, rests carry nothing."""
    sign = 1 if material(name).cathode else -1
    steps = titration(name, rate, rest=1800.0, pulses=int(1.1/0.5/rate)) if kind == "GITT" else make_protocol(name, kind, rate)
    e = ensemble(name, seed=seed, side=sign*5e-8, side_voltage=3.4 if sign > 0 else 0.15)
    ds = run(name, e, steps, x_start=0.96 if sign > 0 else 0.02)
    assert np.abs(ds.lithium_content - ds.lithium_content[0] + ds.passed - ds.side).max() < 1e-9
    assert (np.diff(ds.time) > 0).all() and (np.diff(sign*ds.side) >= 0).all() and 1e-5 < sign*float(ds.side[-1]) < 0.1
    assert ((ds.filling > 0) & (ds.filling < 1)).all()
    share_of = np.array([s.share for s in SITES[name]])
    np.testing.assert_allclose((ds.filling.values*share_of/share_of.sum()).sum(-1)@e.weight, ds.lithium_content, atol=1e-12)
    assert_steps(ds, steps, (material(name).x_full - material(name).x_empty)/3600)


def assert_steps(ds, steps, per_c, exact=1e-12):
    """Every step carries its current, ends where it should, and the current counts up to the charge."""
    t, v, n, passed = (ds[k].values for k in ("time", "voltage", "rate", "passed"))
    ended, at = 0, 0.0 # cut-offs met; end of the step before
    for k, (_, s) in enumerate(steps, 1):
        rows = np.flatnonzero(ds.step.values == k)
        if k == 1: rows = rows[1:] # row 0 is the state before
        if rows.size == 0: continue # beyond its cut-off when it began
        before, spent = rows[0] - 1, t[rows[-1]] - at
        went = passed[rows[-1]] - passed[before]
        if s.kind == "hold":
            np.testing.assert_allclose(v[rows], s.until, atol=1e-6)
            assert (np.diff(np.abs(n[rows])) < 1e-12).all() and (abs(n[rows[-1]]) < s.below*per_c or spent == pytest.approx(s.seconds))
            assert abs(n[rows[-2]]) >= s.below*per_c
        else:
            np.testing.assert_allclose(n[rows], s.sign*s.rate*per_c, rtol=1e-9, atol=exact)
            assert went == pytest.approx(s.sign*s.rate*per_c*spent, abs=1e-9)
            if s.until is not None: assert (s.sign*(v[rows] - s.until)).max() < 2e-4
            if s.until is not None and (s.seconds is None or spent < s.seconds - 1e-3):
                ended += 1
                assert v[rows[-1]] == pytest.approx(s.until, abs=2e-4)
            elif s.seconds is not None: assert spent == pytest.approx(s.seconds, abs=1e-3)
        at = t[rows[-1]]
    assert ended or all(s.until is None for _, s in steps)


@pytest.mark.parametrize("name", ["LFP", "graphite"])
def test_kinetics_are_their_own_derivatives(name):
    e, rng = ensemble(name, n=9), np.random.default_rng(1)
    xi, v = rng.uniform(0.02, 0.98, (9, len(SITES[name]))), float(SITES[name][0].potential) + 0.013
    _, by_xi, by_v = exchange(e, xi, v)
    h = 1e-6
    np.testing.assert_allclose((exchange(e, xi + h, v)[0] - exchange(e, xi - h, v)[0])/2/h, by_xi, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose((exchange(e, xi, v + h)[0] - exchange(e, xi, v - h)[0])/2/h, by_v, rtol=1e-5, atol=1e-9)
    still = exchange(e, xi, potential(xi, e.u0, e.omega))[0]
    assert np.abs(still).max() < 1e-15 # no current at its own potential
    assert (by_v > 0).all()


@pytest.mark.parametrize(("rates", "last"), [((1.0, 0.5, 0.2), (19, 23.5)), SLOW((0.5, 0.1, 0.02), (18, 21.5))])
def test_gap_of_lfp_falls_to_that_of_zero_current(rates, last):
    """Dreyer et al., Nature Materials 9, 448 (2010): about 20 mV are left at zero current. And fewer particles are active the slower (Li et al., Nature Materials 13, 1149 (2014))."""
    gaps, middle, active = [], [], []
    for rate in rates:
        e = ensemble("LFP", n=60)
        part_way = 0.8*3600/rate # s
        ds = run("LFP", e, [(1, Step("charge", rate, 4.0, part_way)), (1, Step("discharge", rate, 2.5, part_way))], x_start=0.9)
        ds["voltage"] = ds.voltage - ds.rate*e.resistance
        part = [ds.isel(time=(ds.step == k).values & (np.abs(ds.lithium_content - 0.5) < 0.2).values) for k in (1, 2)]
        charge, discharge = (float(np.trapezoid(p.voltage, p.lithium_content)/np.ptp(p.lithium_content.values))*s for p, s in zip(part, (-1, 1), strict=True))
        gaps.append(1e3*(charge - discharge)); middle.append((charge + discharge)/2)
        low = phase_limits(3.0)[0]
        xi = part[0].filling.values[..., 0]
        active.append(((xi > low) & (xi < 1 - low)).astype(float).dot(e.weight).mean())
    assert gaps[0] > gaps[1] > gaps[2] and gaps[0] > 22.5 and last[0] < gaps[2] < last[1], gaps
    assert middle == pytest.approx([3.43]*3, abs=0.003)
    assert active[0] > 1.3*active[1] > 1.6*active[2] and active[2] < 0.12, active


def test_graphite_goes_by_its_stages():
    """Lithiation plateaus near 85 and 120 mV, and a step near 0.21 V (Dahn, Phys. Rev. B 44, 9170 (1991); Ohzuku et al., J. Electrochem. Soc. 140, 2490 (1993))."""
    ds = run("graphite", ensemble("graphite", resistance=1e-4), [(1, Step("discharge", 0.05, 0.01))], x_start=0.02)
    at = lambda x: float(np.interp(x, ds.lithium_content, ds.voltage))
    assert at(0.75) == pytest.approx(0.085, abs=0.01) and at(0.38) == pytest.approx(0.12, abs=0.01) and at(0.1) == pytest.approx(0.21, abs=0.015)
    slope = lambda a, b: (at(a) - at(b))/(b - a)
    assert slope(0.6, 0.5) > 0 and slope(0.5, 0.6) > 5*slope(0.65, 0.85) and slope(0.5, 0.6) > 5*slope(0.3, 0.45) # the step between the plateaus at half filling
    assert len(ds.time) > 100 and float(ds.lithium_content[-1]) > 0.9


@pytest.mark.parametrize("name", ["LFP", "graphite"])
@pytest.mark.parametrize("x", [0.02, 0.3, 0.5, 0.7, 0.97])
def test_before_the_first_current_all_is_still(name, x):
    filling, v = equilibrium(SITES[name], x)
    share_of = np.array([s.share for s in SITES[name]])
    assert (filling*share_of).sum()/share_of.sum() == pytest.approx(x, abs=1e-9)
    own = np.array([potential(f, s.potential, s.interaction) for f, s in zip(filling, SITES[name], strict=True)])
    mixed = (filling > 1e-6) & (filling < 1 - 1e-6) # others are empty or full: they can be at any potential beyond their end
    if x in (0.02, 0.97): np.testing.assert_allclose(own[mixed], v, atol=0.05*VOLT)
    assert (own[filling <= 1e-6] <= v).all() and (own[filling >= 1 - 1e-6] >= v).all()


# ----------------------------------------------------------------------------------------------------------------------- diffusion
NMC = {"CC": constant_current("NMC811", 0.2), "CCCV": make_protocol("NMC811", "CCCV", 0.5), "GITT": titration("NMC811", 0.5, rest=1800.0, pulses=5)} # the last pulses meet the cut-off


@pytest.fixture(scope="module")
def nmc():
    import pybamm
    before = pybamm.logger.level
    pybamm.logger.setLevel(17)
    ds = {kind: run_half_cell(steps, x_start=0.95, resistance=300.0, side=3e-8) for kind, steps in NMC.items()}
    level = pybamm.logger.level
    pybamm.logger.setLevel(before)
    return ds, level


@pytest.mark.parametrize("kind", ["CC", "CCCV", "GITT"])
def test_charge_is_the_integral_of_the_current(nmc, kind):
    """The solver counts lithium, we count current: independent of each other."""
    ds = nmc[0][kind]
    t, n, step = ds.time.values, ds.rate.values, ds.step.values
    same = np.diff(step) == 0
    across = np.where(same, (n[1:] + n[:-1])/2, n[1:]) # the first row of a step stands some seconds after its beginning
    counted = np.r_[0, np.cumsum(across*np.diff(t))]
    assert np.abs(counted - ds.passed).max() < (3e-4 if kind == "CCCV" else 3e-6) # a hold is sampled at the period
    np.testing.assert_allclose(ds.side, 3e-8*t, atol=1e-12)
    assert (np.diff(t) > 0).all() and ((ds.shells > 0) & (ds.shells < 1)).all()
    np.testing.assert_allclose(ds.shells.mean(("layer", "shell")), ds.lithium_content, atol=1e-12)
    per_c = 0.7/3600
    for k, (_, s) in enumerate(NMC[kind], 1):
        rows = step == k
        assert rows.any()
        if s.kind == "hold":
            np.testing.assert_allclose(ds.voltage[rows][1:], s.until, atol=2e-4)
            assert n[rows][-1] == pytest.approx(s.below*per_c, rel=1e-4) and (n[rows][1:-1] > s.below*per_c).all() # what a cycler measures, the side reaction in it
        elif s.sign: np.testing.assert_allclose(n[rows], s.sign*s.rate*per_c, rtol=1e-6)
        if s.sign and s.seconds is None: assert float(ds.voltage[rows][-1]) == pytest.approx(s.until, abs=2e-4)


def test_voltage_of_nmc_slopes_where_lfp_is_flat(nmc):
    """A solid solution has no plateau: from 3.0 to 4.3 V nothing is flat, and 10 % of the sites are not filled again (Maerker et al., Chem. Mater. 31, 2545 (2019))."""
    ds = nmc[0]["CC"]
    charge = ds.isel(time=(ds.step == 2).values)
    x, v = charge.lithium_content.values, charge.voltage.values
    at = np.linspace(0.35, 0.9, 12)
    slope = -np.diff(np.interp(at, x[::-1], v[::-1]))/np.diff(at)
    assert (slope > 0.2).all() and 0.5 < np.interp(0.35, x[::-1], v[::-1]) - np.interp(0.9, x[::-1], v[::-1]) < 0.8 # V per unit of x
    assert 0.78 < float(ds.lithium_content[ds.step == 4][-1]) < 0.94
    lfp = run("LFP", ensemble("LFP", resistance=1e-4), [(1, Step("charge", 0.2, 4.0))], x_start=0.96)
    flat = np.interp([0.25, 0.75], lfp.lithium_content[::-1], lfp.voltage[::-1])
    assert abs(np.diff(flat)[0])/0.5 < 0.03


def test_surface_leads_and_center_lags(nmc):
    ds = nmc[0]["CC"]
    radial = ds.shells.mean("layer")
    middle = {k: int(np.flatnonzero((ds.step == k).values).mean()) for k in (2, 4)}
    for k, sign in ((2, 1), (4, -1)): # shell 0 is the outermost
        inward = sign*np.diff(radial[middle[k]])
        assert (inward > -1e-9).all() and inward.sum() > 0.005


def test_pybamm_is_left_as_it_was(nmc):
    import pybamm
    assert nmc[1] == 17
    before = pybamm.logger.level
    for bad, says in ((make_protocol("NMC811", rate=40.0), "rate"), ([(1, Step("charge", 0.5, 4.0)), (1, Step("discharge", 0.5, 1.2))], "check the cut-offs"), ([], "list of"),
                      ([(1, Step("charge", 0.5, seconds=40_000.0))], "instead of 40000 s")):
        with pytest.raises(BattError, match=says) as e: run_half_cell(bad, x_start=0.95)
        assert e.value.mend and pybamm.logger.level == before


@QUICK
@given(nodes=st.integers(2, 30), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_shells_keep_the_lithium(nodes, n, seed):
    x = np.random.default_rng(seed).uniform(size=(nodes, 2, 3))
    made = shells(x, n)
    np.testing.assert_allclose(made.mean(-1), np.einsum("rlt,r->tl", x, np.diff(np.linspace(0, 1, nodes + 1)**3)), atol=1e-13)
    assert made.min() > x.min() - 1e-12 and made.max() < x.max() + 1e-12
    rising = shells(np.broadcast_to(np.linspace(0, 1, nodes)[:, None, None], (nodes, 1, 1)), n)[0, 0]
    assert (np.diff(rising) <= 1e-12).all() # the outermost first


# --------------------------------------------------------------------------------------------------------------------- hidden cells
def assert_mean_is_charge(cell, rng, n=5):
    """The field's mean is what the coulombs say, less the side reaction."""
    t = np.r_[0.0, rng.uniform(0, cell.duration, n), cell.duration]
    r, e = cell.record, echem(cell)
    counted = cell.differences.x_start - (np.interp(t, e.time, e.capacity)/cell.charge_per_x - np.interp(t, r.time, r.side))
    field = lithium(cell, t)
    assert np.abs(field.mean(("z", "y", "x")).values - counted).max() < 1e-6
    np.testing.assert_array_equal(np.isfinite(field), np.broadcast_to(cell.micro.labels().values == 1, field.shape))
    assert float(field.min()) >= -1e-12 and float(field.max()) <= 1 + 1e-12
    return field


@BY_NAME
def test_mean_of_the_field_is_the_charge(cells, name):
    cell = cells[name]
    assert cell.dead.any() and cell.weight[cell.dead].sum() > 0.02 and abs(float(cell.record.side[-1])) > 1e-6
    assert_mean_is_charge(cell, np.random.default_rng(4))
    if name != "NMC811": # a label volume does for it
        assert_mean_is_charge(make_cell(name, "B", seed=7, micro=cell.micro, protocol=brief(name), differences=replace(cell.differences, dead=0.0, side_current=0.0)), np.random.default_rng(5), 2)


@pytest.mark.parametrize("name", ["LFP", "NMC811"])
def test_mean_of_a_label_volume_is_the_charge(of_labels, name): assert_mean_is_charge(of_labels[name], np.random.default_rng(6))


@pytest.mark.parametrize(("name", "kind", "rate"), [("NMC811", "CC", 2.0), ("LFP", "CC", 2.0), SLOW("NMC811", "CCCV", 1.0), SLOW("NMC811", "CC", 0.5), SLOW("graphite", "CCCV", 0.5), SLOW("graphite", "GITT", 0.2)])
def test_lithium_stays_in_its_range_at_any_rate(micros, name, kind, rate):
    """A dose-slowed spot makes the others go further than the mean: none may hold more than all or less than no lithium."""
    cell = make_cell(name, "E", seed=4, micro=micros[name], protocol=kind, rate=rate)
    x = profile(cell, cell.record.time.values)
    assert x.min() >= 0 and x.max() <= 1
    assert_mean_is_charge(cell, np.random.default_rng(1), 3)
    s = share(cell, np.linspace(0, cell.duration - 60, 9), 60.0, spot=False)
    at = windows(cell, s.time.values, 60.0)
    np.testing.assert_allclose((s*GRID).sum("lithium_content"), np.interp(at, cell.record.time, cell.record.lithium_content).mean(1), atol=1e-9) # clipping at 1 would show here


@BY_NAME
def test_profile_share_and_map_agree(cells, name):
    cell, rng = cells[name], np.random.default_rng(2)
    t = np.sort(rng.uniform(0, cell.duration - 300, 6))
    x = profile(cell, t)
    np.testing.assert_allclose(np.einsum("tps,p->t", x, cell.weight)/x.shape[-1], np.interp(t, cell.record.time, cell.record.lithium_content), atol=1e-9)
    at = windows(cell, t, 240.0)
    assert at.shape == (6, 5) and (at > t[:, None]).all() and (at < t[:, None] + 240).all() and at.mean(1) == pytest.approx(t + 120)
    for spot in (True, False):
        chosen = cell.in_spot if spot else np.ones_like(cell.in_spot)
        s = share(cell, t, 240.0, spot=spot)
        np.testing.assert_allclose(s.sum("lithium_content"), 1, atol=1e-12)
        assert (s >= 0).all() and s.dims == ("time", "lithium_content")
        seen = np.array([np.einsum("tps,p->t", profile(cell, a)[:, chosen], cell.weight[chosen]).mean() for a in at])/x.shape[-1]/cell.weight[chosen].sum()
        np.testing.assert_allclose((s*GRID).sum("lithium_content"), seen, atol=1e-9)
    flat, thick = lithium_map(cell, t[:2], layers=(4, 15))
    field = lithium(cell, t[:2], z=(4, 15))
    np.testing.assert_array_equal(thick, (cell.micro.labels(z=(4, 15)).values == 1).sum(0)*cell.micro.voxel)
    np.testing.assert_array_equal(np.isfinite(flat), np.broadcast_to(thick.values > 0, flat.shape))
    np.testing.assert_allclose((flat*thick).sum(("y", "x"))/thick.sum(), field.mean(("z", "y", "x")), atol=1e-12)


@BY_NAME
def test_two_phases_make_two_heaps_and_a_solid_solution_one(cells, name):
    cell = cells[name]
    r = cell.record.isel(time=(cell.record.step == 2).values).sortby("lithium_content")
    half = np.interp(0.5, r.lithium_content, r.time)
    s = share(cell, half, 0.0, spot=False)[0]
    x, live = profile(cell, half)[0], ~cell.dead
    between = float((cell.weight[live, None]*((x[live] > 0.2) & (x[live] < 0.8))).sum()/x.shape[-1]/cell.weight[live].sum())
    assert between < 0.5 if name == "LFP" else between > 0.9 if name == "NMC811" else between > 0.2
    assert float(s.sum()) == pytest.approx(1)


@BY_NAME
def test_dead_particles_never_move(cells, name):
    cell = cells[name]
    x = profile(cell, np.linspace(0, cell.duration, 40))
    assert np.ptp(x[:, cell.dead], axis=0).max() < 1e-12 and (np.ptp(x[:, ~cell.dead].mean(-1), axis=0) > 0.2).all()
    assert x[0, cell.dead] == pytest.approx(cell.differences.x_start, abs=1e-9)
    if "filling" in cell.record: assert (cell.record.filling.values[:, cell.dead] == cell.record.filling.values[0, cell.dead]).all()


@BY_NAME
def test_a_slowed_spot_lags(micros, name):
    d = replace(draw_differences(name, 3, "B"), dead=0.0, spot=(0.5, 0.5))
    for slow in (1.0, 6.0):
        cell = make_cell(name, "B", seed=3, micro=micros[name], rate=0.5, protocol=constant_current(name, 0.5)[:2], differences=replace(d, spot_slowness=slow))
        t = np.linspace(0.3, 0.8, 6)*cell.duration
        x = profile(cell, t).mean(-1)
        mean = lambda which, x=x, cell=cell: (x[:, which]*cell.weight[which]).sum(1)/cell.weight[which].sum()
        ahead = (mean(cell.in_spot) - mean(~cell.in_spot))*(1 if material(name).cathode else -1)
        assert cell.in_spot.any() and not cell.in_spot.all()
        if slow == 1.0: reference = ahead
    assert (ahead > 0.02).all() and (ahead - reference).mean() > 0.05


def test_a_spot_between_particles_sees_the_nearest_that_fills_a_voxel():
    m = make_microstructure("LFP", (3, 40, 40), voxel=0.2, seed=1) # many particles smaller than a voxel
    assert (m.counts == 0).any()
    d = draw_differences("LFP", 1, "B")
    centers = m.particles["center"].values[:, 1:]/(40*0.2)
    for lost in np.flatnonzero(m.counts == 0)[:5]:
        seen = find_spot(m, replace(d, spot=tuple(centers[lost]), spot_width=0.0))
        assert m.counts[seen].sum() > 0 and not seen[lost]


def test_currents_are_those_of_the_weighed_mass(micros):
    """The laboratory sets mA from C and mg, of a hold's end too; the true mass differs by 1 to 5 %."""
    for name in ("LFP", "NMC811"):
        m, d = material(name), draw_differences(name, 5, "C")
        assert 0.01 <= abs(d.mass/d.mass_weighed - 1) <= 0.05
        cell = make_cell(name, "C", seed=5, micro=micros[name], protocol="CCCV", rate=1.0)
        e, one_c = echem(cell), d.mass_weighed*1e-6*m.capacity*(m.x_full - m.x_empty) # A
        np.testing.assert_allclose(e.current[(e.step == 2).values][1:], one_c, rtol=1e-6)
        np.testing.assert_allclose(e.current[(e.step == 5).values][1:], -one_c, rtol=1e-6)
        held = e.current[(e.step == 3).values].values
        assert 0.15*one_c < held[-1] < 0.2*one_c*1.0001 < held[-2]*1.001


@pytest.mark.parametrize("name", NAMES)
def test_a_box_of_the_field_is_a_cut_of_it(cells, of_labels, name):
    cell, t = cells[name], np.array([0.3, 0.6])*cells[name].duration
    whole, part = lithium(cell, t), lithium(cell, t, z=(3, 9), y=(10, 31), x=(0, 7))
    np.testing.assert_allclose(part, whole[:, 3:9, 10:31, 0:7], atol=1e-13)
    xr.testing.assert_allclose(lithium(cell, t[1]), whole[1])
    assert whole.attrs["units"] == "1" and whole.z.attrs["units"] == "µm" and float(whole.x[1] - whole.x[0]) == pytest.approx(cell.micro.voxel)
    np.testing.assert_array_equal(part.x, whole.x[:7])
    if name in of_labels:
        other = of_labels[name]
        np.testing.assert_allclose(lithium(other, t[0], z=(2, 5)), lithium(other, t[0])[2:5], atol=1e-13)


@QUICK
@given(xi=st.lists(st.floats(0, 1), min_size=1, max_size=20), omega=st.sampled_from([-9.95, 0.5, 2.0, 2.05, 2.6, 3.0, 4.5]), n=st.integers(2, 60), rim=st.booleans())
def test_a_front_keeps_the_mean(xi, omega, n, rim):
    xi = np.array(xi)
    x = front(xi, omega, n, rim)
    assert x.shape == (xi.size, n) and x.min() >= -1e-12 and x.max() <= 1 + 1e-12
    np.testing.assert_allclose(x.mean(-1), xi, atol=1e-13)
    slope = np.diff(x, axis=-1)*(-1 if rim else 1)
    assert (slope >= -1e-12).all() # rich at one end, poor at the other
    if omega > 2:
        spinodal, poor = phase_limits(omega)
        inner = (xi > spinodal) & (xi < 1 - spinodal)
        np.testing.assert_array_equal(x[~inner], np.repeat(xi[~inner, None], n, 1))
        assert np.log(poor/(1 - poor)) + omega*(1 - 2*poor) == pytest.approx(0, abs=1e-9) and poor <= spinodal


@BY_NAME
def test_what_lies_outside_of_the_record_is_refused(cells, name):
    cell = cells[name]
    for t in (-5.0, cell.duration + 5, [0.0, cell.duration + 5]):
        for f in (lithium, profile):
            with pytest.raises(BattError, match="ask for times within it"): f(cell, t)
    lithium(cell, cell.duration, z=(0, 1))
    share(cell, cell.duration - 100, 100.0)
    for t, exposure in ((cell.duration - 99, 100.0), (cell.duration - 1000, 1009.0), (cell.duration, 1.0)):
        with pytest.raises(BattError, match="earlier frames, or a shorter exposure"): share(cell, t, exposure)
    with pytest.raises(BattError, match="within it"): share(cell, -30.0, 10.0)
    with pytest.raises(BattError, match="one after the last"): lithium(cell, 0.0, z=(0, 99))


def test_differences_have_streams_of_their_own():
    d = {c: draw_differences("LFP", 1, c) for c in "ABCDE"}
    assert d["B"] == draw_differences("LFP", 1, "B") != draw_differences("LFP", 2, "B") and len({x.resistance for x in d.values()}) == 5
    assert draw_differences("LFP", 1, "B", dose=0.0) == replace(d["B"], spot_slowness=1.0) # the dose draws nothing
    half, whole = draw_differences("LFP", 1, "B", spread=0.5), d["B"]
    assert half.side_current == pytest.approx(whole.side_current/2) and half.dead == pytest.approx(whole.dead/2) and half.resistance - 28 == pytest.approx((whole.resistance - 28)/2)
    assert len({draw_differences("LFP", s, c, spread=0.0, dose=0.0) for s in (1, 2) for c in "AB"}) == 1
    many = [draw_differences(n, s, "B") for n in NAMES for s in range(60)]
    off = np.array([abs(x.mass/x.mass_weighed - 1) for x in many])
    assert off.min() >= 0.01 - 1e-12 and off.max() <= 0.05 + 1e-12 and {np.sign(x.mass - x.mass_weighed) for x in many} == {-1, 1}
    assert all(0 < x.x_start < 1 and 0 <= x.dead < 0.06 and 0 < x.resistance and 0 < min(x.spot) and max(x.spot) < 1 for x in many)


@pytest.mark.parametrize("name", ["LFP", "graphite"])
def test_same_seed_same_cell_another_seed_another(cells, name):
    first = cells[name]
    cell, again, other = (make_cell(name, "B", seed=s, micro=first.micro, protocol=brief(name), differences=first.differences) for s in (7, 7, 8))
    assert again.record.identical(cell.record) and (again.dead == cell.dead).all()
    assert not other.record.equals(cell.record) and not (other.dead == cell.dead).all()


def test_coarse_and_fine_voxels_claim_alike(micros):
    """The threshold of the binder and the scale are set on a coarser mesh: it must see the same particles."""
    m = micros["NMC811"]
    fine, coarse = claim(m)["particle"], claim(m, coarse=2)["particle"]
    assert (fine >= 0).mean() == pytest.approx((coarse >= 0).mean(), abs=0.01)
    both = (fine[::2, ::2, ::2] == coarse[:10, :18, :18]).mean()
    assert both > 0.8
