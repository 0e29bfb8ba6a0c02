"""The twin's cycler: which rows are stored, how they are measured, and the three files read again."""
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import xarray as xr
from batt_nb.campaign import read
from batt_nb.core import BattError, absolute_time, flags
from batt_nb.twin.cycler import COLUMNS, CYCLERS, instants, measure, record, write_bdf, write_mpt

START = datetime(2026, 3, 16, 9, 0, 0, 190000, tzinfo=timezone(timedelta(hours=1)))


def truth(amps=1.5e-3, dt=2.0):
    """Rest, charge, hold, rest, pulses, discharge: each step starts where the one before ended; the second cycle begins with the discharge."""
    plan, rows, t, q = [(0, 300), (1, 3000), ("hold", 900), (0, 600), *[(1, 120), (0, 300)]*3, (-1, 3600), (0, 600)], [], 0.0, 0.0
    for number, (sign, length) in enumerate(plan, 1):
        clock = np.arange(0, length + dt, dt)
        i = amps*np.exp(-clock/400) if sign == "hold" else sign*amps*np.ones(clock.size)
        charge = q + np.r_[0, np.cumsum((i[1:] + i[:-1])/2*dt)]/3600
        v = np.full(clock.size, 4.1) if sign == "hold" else 3.5 + 300*charge + 40*i*(2 - np.exp(-clock/60))
        rows.append(np.c_[t + clock, v, i, charge, np.full(clock.size, number), np.full(clock.size, 1 + (number > 10))])
        t, q = t + clock[-1], charge[-1]
    t, v, i, charge, step, cycle = np.concatenate(rows).T
    return xr.Dataset({"voltage": ("time", v), "current": ("time", i), "capacity": ("time", charge), "cycle": ("time", cycle.astype(int)), "step": ("time", step.astype(int)),
                       "lithium_content": ("time", 1 - 100*charge)}, {"time": t})


@pytest.fixture(scope="module")
def cell(): return truth()


@pytest.fixture(scope="module")
def rows(cell): return record(cell, every_s=60.0)


def test_rows_are_at_cadence_and_at_changes():
    t = np.linspace(0, 1000, 101)
    assert instants(t, np.full(101, 3.5), 60.0, 0.005, 0.1) == pytest.approx([*np.arange(0, 1000, 60), 1000.0])
    at = instants(t, 3.5 + 1e-3*t, 60.0, 0.005, 0.1) # 1 mV/s: a row every 5 s
    assert np.diff(at)[:-1] == pytest.approx(5.0)
    assert np.diff(instants(t, 3.5 + 1e-3*t, 60.0, 0.0, 0.1))[:-1] == pytest.approx(60.0)
    jump = np.where(t < 500, 3.5, 3.6)
    assert np.diff(instants(t, jump, 60.0, 0.005, 2.0)).min() >= 2.0 - 1e-9
    assert instants(np.array([7.0]), np.array([3.5]), 60.0, 0.005, 0.1).tolist() == [7.0]


def test_recorded_rows_lie_on_the_truth(cell, rows):
    for s in np.unique(cell.step):
        one, kept = cell.isel(time=cell.step.values == s), rows.isel(time=rows.step.values == s)
        assert float(kept.time[0]) == float(one.time[0]) and float(kept.time[-1]) == float(one.time[-1])
        for name in ("voltage", "current", "capacity", "lithium_content"):
            assert np.allclose(kept[name], np.interp(kept.time.values, one.time.values, one[name].values), rtol=0, atol=1e-12)
        assert np.diff(kept.time.values).max(initial=0) <= 60.1 and np.diff(kept.time.values).min(initial=60) >= 0.1 - 1e-9
    assert rows.sizes["time"] < cell.sizes["time"]/5 and rows.step.dtype.kind == "i" and rows.voltage.attrs["units"] == "V"


def test_measure_keeps_the_contract(rows):
    before = rows.copy(deep=True)
    same = measure(rows, strength=0, seed=3)
    assert all(same[n].values.tobytes() == rows[n].values.tobytes() for n in COLUMNS) and float(same.true_current_gain) == 1 and float(same.true_current_offset) == 0
    one, two = measure(rows, seed=3), measure(rows, seed=3)
    assert all(one[n].values.tobytes() == two[n].values.tobytes() for n in one.variables)
    assert float(measure(rows, seed=4).true_current_gain) != float(one.true_current_gain)
    off = [float(measure(rows, strength=s, seed=3).true_current_gain) - 1 for s in (0.5, 1.0, 2.0)]
    assert off[1] == pytest.approx(2*off[0]) and off[2] == pytest.approx(4*off[0])
    sizes = [float(np.abs(measure(rows, strength=s, seed=3).voltage - rows.voltage).max()) for s in (1e-6, 0.5, 1.0, 2.0)]
    assert sizes[0] < 1e-8 and sizes[1] < sizes[2] < sizes[3]
    xr.testing.assert_identical(rows, before)


def test_the_wrong_current_is_counted_too(rows):
    m = measure(rows, seed=8, strength=20)
    g, i0 = float(m.true_current_gain), float(m.true_current_offset)
    seconds = np.cumsum(np.diff(rows.time.values, prepend=0)*(rows.current.values != 0))
    assert np.allclose(m.capacity, g*rows.capacity + i0*seconds/3600, rtol=0, atol=1e-15)
    on = rows.current.values > 1e-3
    assert np.mean((m.current - i0)[on]/rows.current[on]) == pytest.approx(g, abs=4e-4)
    assert (m.current.values[rows.current.values == 0] == 0).all()
    steps = measure(rows, seed=8).voltage.values/(5/2**18)
    assert np.abs(steps - np.round(steps)).max() < 1e-6 # on the converter's steps


@pytest.mark.parametrize("name", CYCLERS)
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_files_read_again(rows, tmp_path, name, strength):
    made = measure(rows, strength=strength, seed=2)
    path = CYCLERS[name](tmp_path/f"run_{name}.txt", made, START, "B7")
    back = read(path)
    assert back.attrs["technique"] == "echem" and not flags(back), flags(back)
    assert back.time.values == pytest.approx(made.time.values, abs=1e-3)
    assert back.voltage.values == pytest.approx(made.voltage.values, abs=3e-7)
    assert np.abs(back.capacity.values - made.capacity.values).max() < 1e-6*np.ptp(made.capacity.values)
    assert np.abs(np.diff(back.capacity.values)).sum() == pytest.approx(np.abs(np.diff(made.capacity.values)).sum(), rel=1e-3) # coulombs
    integral = np.sum(back.current.values[1:]*np.diff(back.time.values))/3600
    if name == "biologic": assert integral == pytest.approx(float(made.capacity[-1] - made.capacity[0]), rel=1e-6, abs=1e-12) # <I> is the mean since the row before
    else: assert np.allclose(back.current, made.current, rtol=0, atol=1e-9)
    assert (back.cycle.values == made.cycle.values).all() and (back.step.values == made.step.values - (name == "biologic")).all()
    expected = {"biologic": "2026-03-16T09:00:00.190", "bdf": "2026-03-16T08:00:00.190", "novonix": "2026-03-16T09:00:00"}[name]
    assert abs(absolute_time(back)[0] - np.datetime64(expected)) <= np.timedelta64(1000 if name == "novonix" else 1, "ms")


def test_which_format_each_is(rows, tmp_path):
    found = {name: read(write(tmp_path/name, rows, START)).attrs["format"] for name, write in CYCLERS.items()}
    assert found == {"biologic": "BioLogic .mpt", "bdf": "Battery Data Format csv", "novonix": "Novonix csv"}


def test_mpt_looks_as_the_lno_files_do(rows, tmp_path):
    raw = write_mpt(tmp_path/"a.mpt", rows, START, "Zelle ä", decimal=",").read_bytes()
    lines = raw.decode("latin-1").split("\r\n")
    head = int(lines[1].split(":")[1])
    assert raw.count(b"\n") == raw.count(b"\r\n") and "Zelle ä" in raw.decode("latin-1") and lines[head - 1].startswith("mode\t") and lines[head - 1].endswith("\t")
    cells = dict(zip(lines[head - 1].split("\t"), lines[head + 40].split("\t"), strict=True))
    assert "." not in "".join(cells.values()) and cells["Ewe/V"].partition("E")[2][0] in "+-" and len(cells["Ewe/V"].partition("E")[2]) == 4
    assert "07/26" not in raw.decode("latin-1") and "Acquisition started on : 03/16/2026 09:00:00.190" in lines
    modes = {s: {line.split("\t")[0] for line in lines[head:-1] if line.split("\t")[4] == str(s - 1)} for s in (1, 2, 3)}
    assert modes == {1: {"3"}, 2: {"1"}, 3: {"2"}} # rest, current held, voltage held
    assert np.allclose(read(tmp_path/"a.mpt").voltage, rows.voltage, atol=3e-7)


@pytest.mark.parametrize("name", CYCLERS)
def test_same_rows_same_bytes(rows, tmp_path, name):
    a, b = (CYCLERS[name](tmp_path/f, measure(rows, seed=5), START, "A").read_bytes() for f in "ab")
    assert a == b and a != CYCLERS[name](tmp_path/"c", measure(rows, seed=6), START, "A").read_bytes()


def test_bad_input_is_refused(rows, tmp_path):
    with pytest.raises(BattError, match="lacks capacity"): record(rows.drop_vars("capacity"))
    with pytest.raises(BattError, match="no numbers"): record(rows.assign(voltage=rows.voltage.where(rows.step != 2)))
    with pytest.raises(BattError, match="runs back"): measure(rows.isel(time=slice(None, None, -1)))
    with pytest.raises(BattError, match="not positive"): record(rows, least_s=0)
    with pytest.raises(BattError, match="no time zone"): write_bdf(tmp_path/"a", rows, START.replace(tzinfo=None))
    with pytest.raises(BattError, match="decimal"): write_mpt(tmp_path/"a", rows, START, decimal=";")
    assert not any(tmp_path.iterdir())
