"""find_offset against a cell and two clocks simulated here, apart from the notebooks' own examples."""
import numpy as np
import pytest
import xarray as xr
from scipy.stats import binom

from batt_nb.campaign.clocks import Curve, find_offset
from batt_nb.core import BattError, flags, history

# cadence: exposure, cycler rows (s), stretches of (duration, current), noise of a frame over the range of the signal
CADENCES = {1: (0.9, 1.0, [(200, 0), (90, 1), (150, 0), (120, -1), (100, 0), (70, 2), (160, 0), (110, -2), (250, 0)], 0.01),
            60: (50.0, 5.0, [(1800, 0), (2700, 1), (600, 0), (2500, -1), (400, 0), (2600, 1), (700, 0), (2500, -1), (1800, 0)], 0.01),
            700: (130.0, 30.0, [(7200, 0), (28000, .1), (27000, -.1), (11000, .25), (10500, -.25), (7200, 0)], 0.01)}
FASTEST = {1: 30.0, 60: 600.0, 700: 1500.0} # s, largest offset put in


def two_clocks(cadence, seed, noise=None):
    """A technique's frames and the cycler's rows of one cell, and the offset and drift between their clocks."""
    rng = np.random.default_rng([cadence, seed])
    exposure, row, stretches, sigma = CADENCES[cadence]
    duration, current = np.array(stretches, float).T
    duration = duration*rng.uniform(.9, 1.1, len(duration))
    ends = np.concatenate([[0], np.cumsum(duration)])
    passed = np.concatenate([[0], np.cumsum(duration*current)])/3600
    rows = np.unique(np.concatenate([np.arange(0, ends[-1], row), ends[1:-1], ends[1:-1] - 1e-3]))
    amps = current[np.minimum(np.searchsorted(ends, rows, "right") - 1, len(current) - 1)]
    echem = xr.Dataset({"capacity": ("time", np.interp(rows, ends, passed)), "current": ("time", amps)}, {"time": rows})
    offset, drift = rng.uniform(-1, 1)*FASTEST[cadence], rng.uniform(-1e-4, 1e-4)
    u = np.arange(1.2*FASTEST[cadence], ends[-1] - 1.2*FASTEST[cadence] - exposure, cadence)
    samples = np.interp(u[:, None] + exposure*(np.arange(50) + .5)/50, ends, passed).mean(1)
    y = 2.0 + 3.0*samples + rng.normal(0, (noise or sigma)*3*np.ptp(passed), len(u))
    feature = xr.DataArray(y, dims="time", coords={"time": (u - offset)/(1 + drift), "exposure": ("time", np.full(len(u), exposure))}, name="edge")
    return feature, echem, offset, drift


def find(cadence, feature, echem, **more):
    return find_offset(feature, echem, **{"max_offset": 1.1*FASTEST[cadence]} | more)


@pytest.mark.parametrize("cadence", CADENCES)
def test_offset_and_drift_are_found(cadence):
    for seed in range(4):
        feature, echem, offset, drift = two_clocks(cadence, seed)
        found = find(cadence, feature, echem)
        assert int(found.identifiable) == 1, found.reason.item()
        assert abs(found.offset - offset) < 4*found.offset_sigma
        assert abs(found.drift - drift) < 4*found.drift_sigma
        assert found.offset_lower < found.offset < found.offset_upper
        assert found.offset_sigma < FASTEST[cadence]/10


def test_drift_is_told_apart_when_the_events_fix_it():
    feature, echem, offset, _ = two_clocks(60, 1, noise=2e-4)
    u = feature.time*(1 + two_clocks(60, 1)[3]) + offset
    fast = feature.assign_coords(time=(u - offset)/(1 + 8e-4))
    found = find(60, fast, echem, max_drift=2e-3)
    assert int(found.drift_identifiable) == 1
    assert abs(found.drift - 8e-4) < 4*found.drift_sigma < 4e-4
    unknown = find(60, fast, echem, max_drift=2e-5)
    assert int(unknown.drift_identifiable) == 0 and float(unknown.drift) == 0
    assert any("reported as 0" in remark for remark in flags(unknown))


def test_without_drift_it_is_zero():
    feature, echem, offset, drift = two_clocks(60, 5)
    found = find(60, feature.assign_coords(time=feature.time*(1 + drift)), echem, max_drift=0.0)
    assert float(found.drift) == 0 and abs(found.offset - offset) < 4*found.offset_sigma


def test_intervals_hold_what_they_say():
    runs, covered = 60, 0
    for seed in range(runs):
        feature, echem, offset, _ = two_clocks(700, 100 + seed)
        found = find(700, feature, echem, level=0.9)
        covered += bool(found.offset_lower < offset < found.offset_upper)
    assert binom.ppf(0.001, runs, 0.9) <= covered <= binom.ppf(0.999, runs, 0.9)


def test_misfit_widens_the_interval():
    for seed in (3, 5):
        feature, echem, offset, _ = two_clocks(60, seed)
        wave = feature + 0.1*float(feature.max() - feature.min())*np.sin(feature.time/2500)
        plain, bent = find(60, feature, echem, max_offset=1000), find(60, wave, echem, max_offset=1000)
        assert bent.offset_sigma > 2*plain.offset_sigma and bent.misfit_sigma > 1.5*plain.residual_sigma
        assert abs(bent.offset - offset) < 4*bent.offset_sigma


@pytest.mark.parametrize("cadence", CADENCES)
@pytest.mark.parametrize("name", ["constant", "noise", "ramp", "step of its own", "wandering"])
def test_nothing_shared_is_not_identifiable(cadence, name):
    feature, echem, *_ = two_clocks(cadence, 3)
    rng, n = np.random.default_rng(cadence), feature.sizes["time"]
    y = {"constant": np.full(n, 7.0), "noise": rng.normal(size=n), "ramp": np.linspace(0, 1, n) + rng.normal(0, .01, n),
         "step of its own": (np.arange(n) > .37*n) + rng.normal(0, .01, n), "wandering": rng.normal(size=n).cumsum()}[name]
    found = find(cadence, feature.copy(data=y), echem)
    assert int(found.identifiable) == 0 and found.reason.item()
    assert np.isnan(found.offset) and np.isnan(found.offset_sigma) and np.isnan(found.drift)


def test_a_cell_that_is_only_charged_tells_no_time():
    t = np.arange(0, 40000.0, 10)
    echem = xr.Dataset({"capacity": ("time", t/36000)}, {"time": t})
    time = np.arange(5000, 30000.0, 100)
    feature = xr.DataArray(time/36000 + np.random.default_rng(0).normal(0, .003, len(time)), dims="time", coords={"time": time})
    found = find_offset(feature, echem)
    assert int(found.identifiable) == 0 and "no event" in found.reason.item()
    assert (found.offset_lower, found.offset_upper) == (-1800, 1800)


def test_no_overlap_and_too_few_frames():
    feature, echem, *_ = two_clocks(60, 4)
    for away in (feature.assign_coords(time=feature.time + 1e7), feature[:5]):
        found = find(60, away, echem)
        assert int(found.identifiable) == 0 and "frames lie inside" in found.reason.item()


def test_a_range_that_ends_before_the_truth_is_refused():
    feature, echem, offset, _ = two_clocks(60, 7)
    reach = abs(offset)*0.6
    found = find(60, feature, echem, max_offset=reach)
    assert int(found.identifiable) == 0


def test_missing_frames_are_masked_and_said():
    feature, echem, offset, _ = two_clocks(60, 6)
    holes = feature.where(feature.time % 7 > 1)
    found = find(60, holes, echem)
    assert abs(found.offset - offset) < 4*found.offset_sigma
    assert any(f"{int(holes.isnull().sum())} of {holes.size} frames" in remark for remark in flags(found))


def test_frames_in_a_pause_are_left_out():
    feature, echem, offset, _ = two_clocks(60, 8)
    broken = echem.where((echem.time < 4000) | (echem.time > 9000), drop=True) # longer than max_gap
    whole, part = find(60, feature, echem), find(60, feature, broken)
    assert part.frames < whole.frames - 70
    assert abs(part.offset - offset) < 4*part.offset_sigma


def test_start_stamps_count():
    feature, echem, *_ = two_clocks(60, 9)
    stamp = lambda da, text: da.assign_attrs(start_time=text)
    same = find(60, stamp(feature, "2026-01-01T00:00:00"), stamp(echem, "2026-01-01T00:00:00"))
    later = find(60, stamp(feature, "2026-01-01T00:00:30"), stamp(echem, "2026-01-01T00:00:00"))
    assert abs(same.offset - later.offset - 30) < 0.2
    corrected = feature.assign_attrs(start_time="2026-01-01T00:00:00", clock_offset=float(same.offset))
    assert abs(find(60, corrected, stamp(echem, "2026-01-01T00:00:00")).offset) < 1.0
    with pytest.raises(BattError, match="zone"):
        find(60, stamp(feature, "2026-01-01T00:00:00+00:00"), stamp(echem, "2026-01-01T00:00:00"))


def test_same_input_same_answer_input_untouched_and_stored(tmp_path):
    feature, echem, *_ = two_clocks(60, 10)
    kept = feature.copy(deep=True), echem.copy(deep=True)
    first, second = find(60, feature, echem), find(60, feature, echem)
    assert first.identical(second)
    assert kept[0].identical(feature) and kept[1].identical(echem)
    assert history(first)[-1]["function"] == "campaign.clocks.find_offset"
    first.to_netcdf(tmp_path/"clock.h5", engine="h5netcdf")
    with xr.open_dataset(tmp_path/"clock.h5", engine="h5netcdf") as back:
        assert float(back.offset) == float(first.offset) and back.offset.units == "s"


def test_bad_input():
    feature, echem, *_ = two_clocks(60, 11)
    with pytest.raises(BattError, match="runs back"):
        find(60, feature, echem.isel(time=slice(None, None, -1)))
    with pytest.raises(BattError, match="order of time"):
        find(60, feature[::-1], echem)
    with pytest.raises(BattError, match="no voltage"):
        find(60, feature, echem, follows="voltage")
    with pytest.raises(BattError, match="one number a frame"):
        find(60, feature.expand_dims("energy"), echem)
    with pytest.raises(BattError, match="positive"):
        find(60, feature, echem, max_offset=-5)


def test_window_averages_are_exact():
    rng = np.random.default_rng(0)
    t, s = np.cumsum(rng.uniform(.1, 3, 200)), rng.normal(size=200)
    u, width = rng.uniform(t[0], t[-1] - 40, 30), rng.uniform(0, 40, 30)
    knots = [np.unique(np.concatenate([[a, a + w], t[(t > a) & (t < a + w)]])) for a, w in zip(u, width)]
    nodes, weights = np.polynomial.legendre.leggauss(4)
    def exact(knots, power):
        h, mid = np.diff(knots)[:, None]/2, (knots[1:] + knots[:-1])[:, None]/2
        return (h*weights*np.interp(mid + h*nodes, t, s)**power).sum()
    truth = np.array([[exact(k, p)/w for k, w in zip(knots, width)] for p in (1, 2, 3)])
    np.testing.assert_allclose(Curve(t, s, 3).mean(u, width), truth, rtol=1e-9, atol=1e-9)
