"""Frames joined to their own cell by clock, to sister cells by lithium content, and the comparison of protocols."""
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from batt_nb.campaign.joining import align, find_gaps, integrate_lines
from batt_nb.campaign.protocol import half_cycle_table, protocol_differences, same_protocol
from batt_nb.campaign.state import charge_state, theoretical_capacity
from batt_nb.core import BattError, flags, history
from conftest import DATA, needs_data, oracle

START = "2024-03-01T08:00:00"


def ocv(x):
    """Open-circuit voltage of a made-up layered oxide."""
    return 3.85 + 0.8*(0.5 - x) + 0.05*np.arctanh(0.998*(1 - 2*x)) - 0.1*np.exp((x - 0.97)/0.01)


def half_cell(seed=0, mass=10.0, weighing=0.02, polarization=0.04, rate=0.1, window=(3.0, 4.3), rest_s=1800.0, half_cycles=4, start=START, name="A", sigma_x0=0.005):
    """State of a simulated half-cell, made with the mass as weighed and the start as believed; `true_x` beside it."""
    rng, grid = np.random.default_rng(seed), np.linspace(1, 1e-3, 2000)
    weighed, x0 = mass*(1 + weighing*rng.normal()), 0.96 + sigma_x0*rng.normal()
    per_x, i_mA = mass*theoretical_capacity("LiNiO2")*1e-3, rate*weighed*theoretical_capacity("LiNiO2")*1e-3
    t, i, x = [np.arange(0, 601, 60.0)], [np.zeros(11)], [np.full(11, x0)]
    for h in range(half_cycles):
        way = 1 if h % 2 == 0 else -1
        seconds = abs(np.interp(window[way > 0] - way*polarization, ocv(grid), grid) - x[-1][-1])*per_x/i_mA*3600
        for s, c in ((np.r_[np.arange(60, seconds, 60), seconds], way*i_mA), (np.arange(60.0, rest_s + 1, 60), 0.0)):
            if not s.size: continue
            x.append(x[-1][-1] - c*s/3600/per_x); i.append(np.full(s.size, c)); t.append(t[-1][-1] + s)
    t, i, x = map(np.concatenate, (t, i, x))
    v = ocv(x) + polarization*np.sign(i) + 3e-4*rng.normal(size=t.size)
    ds = xr.Dataset({"voltage": ("time", v), "current": ("time", i*1e-3*(1 + 1e-4*rng.normal(size=t.size))), "capacity": ("time", (x0 - x)*per_x*1e-3), "true_x": ("time", x)}, {"time": t})
    ds = ds.assign_attrs(start_time=start, cell=name, technique="echem")
    return charge_state(ds, SimpleNamespace(electrode_material="LiNiO2", active_mass_mg=weighed, active_mass_sigma_mg=max(weighing, 1e-9)*weighed, starting_composition=0.96, starting_composition_sigma=sigma_x0))


def look(state, f, every=1200.0, exposure=300.0, name="signal"):
    """Frames of a technique that sees f(true x), joined to their own cell; `true_x` in the middle of each."""
    t = np.arange(30.0, float(state.time[-1]) - exposure, every)
    middle = np.interp(t + exposure/2, state.time, state.true_x)
    ds = xr.Dataset({name: ("time", f(middle)), "true_x": ("time", middle)}, {"time": t, "exposure": ("time", np.full(t.size, exposure))})
    return align(ds.assign_attrs(start_time=state.start_time, cell=state.attrs["cell"]), state)


def frames(times, exposure=None, start=START, **attrs):
    ds = xr.Dataset({"signal": ("time", np.arange(len(times), dtype=float))}, {"time": np.asarray(times, float)}).assign_attrs(start_time=start, **attrs)
    return ds if exposure is None else ds.assign_coords(exposure=("time", np.broadcast_to(np.asarray(exposure, float), len(times)).copy()))


def lattice(x): return 14.2 + 0.3*np.sin(np.pi*x)


# by clock: the real campaigns

@needs_data
def test_lno_voltages_as_in_the_oracle():
    from batt_nb.campaign.reading import read
    samples = oracle("operando_alignment")["result"]["samples"]
    stamps = np.array([s["start"].replace(" ", "T") for s in samples], "datetime64[ns]")
    seconds = (stamps - stamps[0]).astype("int64")/1e9
    joined = align(frames(seconds, 130.0, start=str(stamps[0])), charge_state(read(DATA/"campaigns/lno-operando-xas/raw/echem", "echem")))
    np.testing.assert_allclose(joined.voltage_at_start, [s["voltage_V"] for s in samples], atol=2e-7)
    later = [s["voltage_at_start_plus_time_from_start_V"] for s in samples]
    assert (np.abs(joined.voltage.values - later) < 3e-3).all() # the mean of a window is near the value in its middle
    np.testing.assert_allclose(joined.current*1e3, [s["current_mA"] for s in samples], rtol=0.02)
    assert (joined.overlap == 1).all() and (np.sign(joined.current) == np.where(joined.branch == 1, 1, -1)).all()


@needs_data
def test_the_pause_between_the_two_lno_files_is_no_gap():
    from batt_nb.campaign.reading import read
    record = read(DATA/"campaigns/lno-operando-xas/raw/echem", "echem")
    gap = oracle("operando_alignment")["mpt"]["mpt_gap_s"]
    assert np.isclose(np.diff(record.time), gap, atol=1e-3).any() and find_gaps(record.time.values)[0].all()


@needs_data
def test_coincell_voltages_as_in_the_oracle_and_the_first_is_missing():
    from batt_nb.campaign.reading import read
    archive = "campaigns/coincell-operando-xrd/raw/coincell8_LDE2_reduced.zip"
    scans = oracle("xrd")["files"][archive]["scans"]
    state = charge_state(read(f"{DATA/archive}::coincell8_LDE2/Echem/cc8.ndax", "echem"))
    start, end = (np.array([s[k] for s in scans], "datetime64[ns]") for k in ("start", "end"))
    as_seconds = lambda stamps: (stamps - start[0]).astype("int64")/1e9
    joined = align(frames(as_seconds(start), as_seconds(end) - as_seconds(start), start=str(start[0])), state)
    for where, at in (("start", start), ("middle", start + (end - start)/2), ("end", end)):
        found = align(frames(as_seconds(at), start=str(start[0])), state).voltage_at_start.values
        expected = np.array([np.nan if s[f"voltage_at_{where}_V"] is None else s[f"voltage_at_{where}_V"] for s in scans])
        np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.isnan(joined.voltage[0]) and joined.branch[0] == -1 and joined.cycle[0] == -1 and joined.overlap[0] == 0
    assert any("1 of 5 frames lie outside" in f for f in flags(joined))


# by clock: windows

@pytest.mark.parametrize("seed", range(5))
def test_window_means_are_exact(seed):
    rng = np.random.default_rng(seed)
    t = np.sort(rng.uniform(0, 100, 60)); y = rng.normal(size=60)
    a = rng.uniform(t[0], t[-1] - 20, 30); b = a + rng.uniform(0.01, 20, 30)
    found = (integrate_lines(t, y, np.ones(59, bool), b) - integrate_lines(t, y, np.ones(59, bool), a))/(b - a)
    for k in range(30):
        s = np.unique(np.r_[a[k], t[(t > a[k]) & (t < b[k])], b[k]])
        assert found[k] == pytest.approx(np.trapezoid(np.interp(s, t, y), s)/(b[k] - a[k]), abs=1e-11)


def test_every_joined_variable_is_the_mean_over_the_window():
    state = half_cell()
    joined = align(frames([5000.0, 9000.5, 40000.0], 600.0), state)
    fine = np.linspace(0, 600, 60001)
    for k, t in enumerate(joined.time.values):
        for name in ("voltage", "capacity", "lithium_content", "lithium_content_sigma"):
            assert float(joined[name][k]) == pytest.approx(np.mean(np.interp(t + fine, state.time, state[name])), abs=2e-5)
        q = np.interp([t, t + 600], state.time, state.capacity)
        assert float(joined.current[k]) == pytest.approx(np.diff(q)[0]*6, rel=1e-9)
    assert history(joined)[-1]["function"] == "campaign.joining.align" and joined.voltage.units == "V"


def test_gap_partial_overlap_and_unknown_time_are_masked():
    state = half_cell()
    cut = state.isel(time=np.flatnonzero((state.time < 9000) | (state.time > 20000)))
    joined = align(frames([-200, 500, 8800, 12000, np.nan, 30000], 400.0), cut)
    assert np.isfinite(joined.voltage.values).tolist() == [False, True, False, False, False, True]
    last = float(cut.time[int((cut.time < 10000).sum()) - 1])
    np.testing.assert_allclose(joined.overlap, [0.5, 1, (last - 8800)/400, 0, np.nan, 1])
    assert joined.branch.values[[0, 2, 3, 4]].tolist() == [-1]*4
    assert np.isnan(joined.voltage_at_start[3]) and np.isfinite(joined.voltage_at_start[2])
    says = " ".join(flags(joined))
    assert "1 of 6 frames have no known time" in says and "3 of 6 frames are not wholly covered" in says
    relaxed = align(frames([-200, 500], 400.0), cut, minimum_overlap=0.4)
    assert np.isfinite(relaxed.voltage).all()


def test_without_exposure_the_start_counts_and_it_is_said():
    state = half_cell()
    joined = align(frames([5000.0, 7777.7]), state)
    np.testing.assert_array_equal(joined.voltage, joined.voltage_at_start)
    np.testing.assert_allclose(joined.voltage, np.interp([5000.0, 7777.7], state.time, state.voltage))
    assert any("no known exposure" in f for f in flags(joined))


def test_a_frame_that_straddles_a_turn_says_its_share():
    state = half_cell(rest_s=0.0)
    turn = float(state.time[int((state.half_cycle.values == 2).argmax()) - 1])
    joined = align(frames([turn - 300.0, turn - 100.0], 400.0), state)
    np.testing.assert_allclose(joined.branch_share, 0.75, atol=0.08)
    assert joined.branch.values.tolist() == [1, 2] and joined.half_cycle.values.tolist() == [1, 2]


def test_zones_offsets_and_drifts():
    state = half_cell().assign_attrs(timezone="Europe/Paris")
    plain = align(frames([5000.0], 60.0, timezone="Europe/Paris"), state)
    utc = align(frames([5000.0], 60.0, start="2024-03-01T07:00:00+00:00"), state)
    shifted = align(frames([4990.0], 60.0, timezone="Europe/Paris", clock_offset=10.0), state)
    np.testing.assert_allclose([utc.voltage[0], shifted.voltage[0]], plain.voltage[0])
    drifted = align(frames([5000.0], 60.0, timezone="Europe/Paris", clock_drift=0.01), state)
    assert float(drifted.voltage_at_start[0]) == pytest.approx(float(np.interp(5050.0, state.time, state.voltage)))
    with pytest.raises(BattError, match="zone"): align(frames([5000.0], 60.0), state)


def test_clocks_that_do_not_overlap_are_an_error_with_both_ranges():
    with pytest.raises(BattError) as e: align(frames([0, 100.0], 60.0, start="2024-02-29T08:00:00"), half_cell())
    assert all(word in str(e.value) for word in ("2024-02-29", "2024-03-01", "h before", "clock.offset_s", "clock.timezone"))
    with pytest.raises(BattError, match="never compared"): align(frames([100.0], cell="B"), half_cell())
    with pytest.raises(BattError, match="known time"): align(frames([np.nan]), half_cell())
    with pytest.raises(BattError, match="start_time"): align(frames([10.0]).drop_attrs(), half_cell())
    with pytest.raises(BattError, match="one record"): align(frames([10.0]), half_cell(), half_cell())


def test_a_clock_that_counts_from_the_cyclers_start_needs_no_date():
    state = half_cell()
    dated = align(frames([5000.0], 60.0), state)
    undated = state.copy(); undated.attrs.pop("start_time")
    ds = frames([1000.0], 60.0, clock_offset=4000.0, relative_to="echem"); ds.attrs.pop("start_time")
    assert float(align(ds, undated).voltage[0]) == pytest.approx(float(dated.voltage[0]))
    ds.attrs["clock_offset"] = 1e7
    with pytest.raises(BattError, match="clocks do not overlap.* s, cycler"): align(ds, undated)


def test_lazy_frames_stay_lazy():
    import dask.array as da
    ds = frames([5000.0, 6000.0], 60.0).assign(image=(("time", "y", "x"), da.ones((2, 30, 30), chunks=(1, 30, 30))))
    assert align(ds, half_cell()).image.chunks is not None


# sister cells

def test_sisters_are_joined_within_the_stated_uncertainty():
    z, reached = [], []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        a = look(half_cell(seed=3*seed, polarization=rng.uniform(0.02, 0.08)), lattice, name="a")
        b = look(half_cell(seed=3*seed + 1, mass=rng.uniform(8, 12), polarization=rng.uniform(0.02, 0.08), start="2023-01-01T00:00:00", name="B"), lattice, name="c")
        both = align(a, b, on="lithium_content")
        k = int(np.abs(both.lithium_content.values - 0.3 + 10*(both.half_cycle.values != 1)).argmin())
        assert both.half_cycle[k] == 1
        z.append(float((both.c[k] - lattice(a.true_x[k]))/both.c_join_sigma[k]))
        moving = both.branch.values > 0
        reached.append(np.isfinite(both.c.values[moving]).mean())
    z = np.array(z)
    assert 0.87 <= (np.abs(z) < 2).mean(), z # 0.954 expected, binomial scatter 0.030
    assert 0.7 < z.std() < 1.3 and np.mean(reached) > 0.9


def test_spread_is_the_standard_deviation_between_cells():
    offsets = (0.0, 0.01, -0.01, 0.02)
    a = look(half_cell(seed=1, weighing=0, sigma_x0=0), lattice, name="a")
    others = [look(half_cell(seed=2, weighing=0, sigma_x0=0, name=f"S{k}", mass=9 + k), lambda x, o=o: lattice(x) + o, every=300.0, exposure=30.0, name="c") for k, o in enumerate(offsets)]
    both = align(a, *others, on="lithium_content")
    at = np.flatnonzero((both.branch.values == 1) & (both.cells.values == 4) & (both.branch_share.values > 0.999))
    assert at.size > 20
    np.testing.assert_allclose(both.c_spread.values[at], np.std(offsets, ddof=1), atol=5e-4)
    np.testing.assert_allclose(both.c.values[at], lattice(a.true_x.values[at]) + np.mean(offsets), atol=2e-3)
    assert (both.x_distance.values[at] < 0.02).all() and not any("no spread" in f for f in flags(both))


def test_one_cell_gives_no_spread_and_says_so():
    a, b = look(half_cell(1), lattice, name="a"), look(half_cell(2, name="B"), lattice, name="c")
    for others in ((b,), (b, b)): # twice the same cell is one cell
        both = align(a, *others, on="lithium_content")
        assert np.isnan(both.c_spread).all() and any("one cell gives no spread" in f for f in flags(both)) and (both.cells.values <= 1).all()


def test_branches_never_mix_and_the_voltage_of_sisters_shows_hysteresis():
    a, b = look(half_cell(1, polarization=0.05), lattice, name="a"), look(half_cell(2, polarization=0.05, name="B"), lattice, name="c")
    both = align(a, b, on="lithium_content")
    middle = (np.abs(both.lithium_content - 0.5) < 0.1).values & (both.branch_share > 0.999).values
    up, down = (float((both.voltage_others - ocv(both.lithium_content)).values[middle & (both.branch.values == code)].mean()) for code in (1, 2))
    assert up - down == pytest.approx(0.1, abs=0.01)
    charged_only = b.isel(time=np.flatnonzero(b.branch == 1))
    assert np.isnan(align(a, charged_only, on="lithium_content").c.values[both.branch.values != 1]).all()
    first_only = b.isel(time=np.flatnonzero(b.cycle == 1))
    assert np.isnan(align(a, first_only, on="lithium_content").c.values[both.cycle.values != 1]).all()


def test_clocks_of_sisters_do_not_matter():
    a, b = look(half_cell(1), lattice, name="a"), look(half_cell(2, name="B"), lattice, name="c")
    other = b.assign_coords(time=b.time*17 + 5).assign_attrs(start_time="1999-12-31T00:00:00+03:00", clock_offset=1e6)
    for name in ("c", "x_distance", "c_join_sigma"):
        np.testing.assert_array_equal(align(a, b, on="lithium_content")[name], align(a, other, on="lithium_content")[name])
    shuffled = b.isel(time=np.random.default_rng(0).permutation(b.sizes["time"]))
    moving = a.branch.values > 0
    np.testing.assert_allclose(align(a, shuffled, on="lithium_content").c.values[moving], align(a, b, on="lithium_content").c.values[moving])


def test_nothing_is_extrapolated_or_bridged():
    a, b = look(half_cell(1), lattice, name="a"), look(half_cell(2, name="B"), lattice, name="c")
    part = b.isel(time=np.flatnonzero((b.lithium_content > 0.7) | (b.lithium_content < 0.3)))
    both = align(a, part, on="lithium_content")
    x, moving = both.lithium_content.values, both.branch.values > 0
    assert np.isnan(both.c.values[moving & (x > 0.35) & (x < 0.65)]).all() and np.isfinite(both.c.values[moving & (x > 0.75) & (x < 0.9)]).all()
    lowest = float(part.lithium_content.min())
    assert np.isnan(both.c.values[moving & (x < lowest)]).all() and any("nothing is extrapolated" in f for f in flags(both))


def test_rests_find_rests():
    a, b = look(half_cell(1, weighing=0, sigma_x0=0), lattice, every=200.0, exposure=60.0, name="a"), look(half_cell(2, weighing=0, sigma_x0=0, name="B"), lattice, every=200.0, exposure=60.0, name="c")
    both = align(a, b, on="lithium_content")
    rest = (both.branch.values == 0) & (both.branch_share.values > 0.999)
    assert rest.sum() > 10 and np.isfinite(both.c.values[rest]).all()
    np.testing.assert_allclose(both.c.values[rest], lattice(a.true_x.values[rest]), atol=0.01)


def test_further_dimensions_complex_values_and_grids():
    a, b = look(half_cell(1), lattice, name="a"), look(half_cell(2, name="B"), lattice, name="c")
    two = b.assign(pattern=b.c*xr.DataArray([1.0, 2.0, 3.0], dims="two_theta", coords={"two_theta": [10.0, 11.0, 12.0]}), fid=b.c*(1 + 1j))
    both = align(a, two, on="lithium_content")
    assert set(both.pattern.dims) == {"time", "two_theta"}
    np.testing.assert_allclose(both.pattern.isel(two_theta=1).values, 2*both.c.values)
    np.testing.assert_allclose(both.fid.values.imag, both.c.values)
    assert np.isfinite(both.fid_join_sigma.values).any()
    other = two.assign_coords(two_theta=[10.0, 11.0, 12.5]).assign_attrs(cell="C")
    with pytest.raises(BattError, match="grid"): align(a, two.drop_vars("fid"), other.drop_vars("fid"), on="lithium_content")


def test_sisters_without_a_state_are_refused():
    a, b = look(half_cell(1), lattice, name="a"), look(half_cell(2, name="B"), lattice, name="c")
    with pytest.raises(BattError, match="lithium_content"): align(a, b.drop_vars("lithium_content"), on="lithium_content")
    with pytest.raises(BattError, match="share no state"): align(a, b.assign(half_cycle=b.half_cycle + 40), on="lithium_content")
    with pytest.raises(BattError, match="no other cell"): align(a, on="lithium_content")
    with pytest.raises(BattError, match="correspond"): align(a, b.assign(half_cycle=b.half_cycle.assign_attrs(first_direction=-1)), on="lithium_content")
    with pytest.raises(BattError, match="cannot be joined"): align(a, b, on="voltage")


def test_joined_data_are_stored_and_read_back(tmp_path):
    a, b = look(half_cell(1), lattice, name="a"), look(half_cell(2, name="B"), lattice, name="c")
    both = align(a, b, on="lithium_content")
    both.to_netcdf(tmp_path/"joined.nc", engine="h5netcdf")
    back = xr.load_dataset(tmp_path/"joined.nc", engine="h5netcdf")
    xr.testing.assert_equal(back, both); assert flags(back) == flags(both)


# protocols

def sister(seed, **change):
    rng = np.random.default_rng(seed)
    return half_cell(seed=seed + 10_000, mass=10*(1 + 0.1*rng.normal()), polarization=rng.uniform(0.02, 0.08), name=f"cell{seed}", **change)


def test_the_same_protocol_is_recognized_despite_mass_and_polarization():
    verdicts = [same_protocol(sister(2*s), sister(2*s + 1)).attrs["verdict"] for s in range(30)]
    assert verdicts.count("different") == 0 and verdicts.count("same") >= 28, verdicts


@pytest.mark.parametrize("change, word", [({"rate": 0.2}, "rate"), ({"rate": 0.13}, "rate"), ({"window": (3.0, 4.25)}, "cut-off"), ({"window": (2.8, 4.3)}, "cut-off"), ({"rest_s": 7200.0}, "rest")])
def test_different_protocols_are_told_apart(change, word):
    results = [same_protocol(sister(2*s), sister(2*s + 1, **change)) for s in range(12)]
    assert sum(r.attrs["verdict"] == "different" for r in results) >= 11
    assert all(any(word in d for d in protocol_differences(r)) for r in results if r.attrs["verdict"] == "different")


def test_a_shorter_record_is_the_same_protocol_and_says_what_was_compared():
    result = same_protocol(sister(1), sister(2, half_cycles=2))
    assert result.attrs["verdict"] == "same" and "2 complete ones are compared" in result.attrs["compared"]


def test_without_masses_the_charge_serves_and_unknown_masses_are_undecidable():
    a, b = sister(1), sister(2)
    no_mass = lambda s: s.drop_vars(["lithium_content", "lithium_content_sigma"])
    assert half_cycle_table(no_mass(a)).attrs["rate_by"] == "charge"
    assert same_protocol(no_mass(a), no_mass(b)).attrs["rate_by"] == same_protocol(a, no_mass(b)).attrs["rate_by"] == "charge"
    assert same_protocol(no_mass(a), no_mass(sister(2, rate=0.3))).attrs["verdict"] == "different"
    vague = same_protocol(sister(1, weighing=0.08), sister(2, weighing=0.08))
    assert vague.attrs["verdict"] == "undecidable" and "undecidable" in protocol_differences(vague)[0]


def test_opposite_starts_and_empty_records():
    a = sister(1)
    flipped = charge_state(a[["voltage", "capacity", "current"]].assign(capacity=-a.capacity, current=-a.current))
    assert same_protocol(a, flipped).attrs["verdict"] == "different"
    idle = charge_state(xr.Dataset({"voltage": ("time", np.full(9, 3.5)), "current": ("time", np.zeros(9)), "capacity": ("time", np.zeros(9))}, {"time": np.arange(9.0)}))
    with pytest.raises(BattError, match="no current"): same_protocol(a, idle)
    assert same_protocol(a, a.isel(time=slice(0, 100))).attrs["verdict"] == "undecidable"


def test_a_hold_at_constant_voltage_is_seen():
    state = half_cell(half_cycles=1, rest_s=600.0)
    driven = state.isel(time=slice(0, int(np.flatnonzero(state.branch == 1)[-1]) + 1))[["voltage", "current", "capacity"]]
    s = np.arange(60.0, 7201, 60); decay = float(driven.current[-1])*np.exp(-s/2400)
    q = float(driven.capacity[-1]) + np.cumsum(decay)*60/3600
    tail = xr.Dataset({"voltage": ("time", np.full(s.size, float(driven.voltage[-1]))), "current": ("time", decay), "capacity": ("time", q)}, {"time": float(driven.time[-1]) + s})
    rest = tail.isel(time=slice(-10, None)).assign_coords(time=tail.time.values[-1] + 60*np.arange(1.0, 11)).assign(current=lambda d: d.current*0, capacity=lambda d: d.capacity*0 + q[-1])
    with_hold = charge_state(xr.concat([driven, tail, rest], "time"))
    assert float(half_cycle_table(with_hold).hold[0]) > 0.1 > float(half_cycle_table(state).hold[0])
    assert same_protocol(state, with_hold).attrs["verdict"] == "different"
