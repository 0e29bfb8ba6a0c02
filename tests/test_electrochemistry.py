"""Cycler files against reference values read by other means, and bad input."""
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import DATA, ROOT, needs_data, oracle

from batt_nb.campaign.cyclers import CYCLERS
from batt_nb.campaign.electrochemistry import READER, check_stamps, combine, doubted, mend_clock, read_echem
from batt_nb.core import BattError, flags, start_instant

ECHEM, LNO = DATA/"echem", DATA/"campaigns/lno-operando-xas/raw/echem"
KEYS = ("first", "last", "min", "max", "mean")


def figures(values):
    return {"first": values[0], "last": values[-1], "min": values.min(), "max": values.max(), "mean": values.mean()}


def same(values, reference, scale=1.0, rel=2e-6, floor=1e-9):
    ours = figures(np.asarray(values, float))
    for k in KEYS:
        if k in reference: assert ours[k] == pytest.approx(reference[k]*scale, rel=rel, abs=floor*max(1, abs(scale))), k


def read_named(name, tmp_path):
    """The file of an oracle key, members of a zip unpacked."""
    outer, _, inner = name.partition("::")
    if not inner: return read_echem(DATA/outer)
    with zipfile.ZipFile(DATA/outer) as z: return read_echem(z.extract(inner, tmp_path))


def names():
    try: return list(oracle("echem")["files"])
    except OSError: return []


# --- every measured file ----------------------------------------------------------------------------------------------

@needs_data
@pytest.mark.parametrize("name", names(), ids=lambda n: n.split("/")[-1])
def test_rows_time_voltage_and_current_agree_with_the_oracle(name, tmp_path):
    ref, ds = oracle("echem")["files"][name], read_named(name, tmp_path)
    assert ds.sizes["time"] == ref["rows"]
    same(ds.voltage, ref["voltage"])
    assert np.isfinite(ds.voltage).all() and np.isfinite(ds.current).all()
    span = ds.time.values[-1] - ds.time.values[0]
    assert span == pytest.approx(ref["time"]["span_last_minus_first"], rel=1e-6, abs=2e-3)
    assert ds.time.values[0] == pytest.approx(ref["time"]["first"], abs=2e-3)
    assert (np.diff(ds.time) >= 0).all()
    if "Time_Bug" not in name:
        gap = ref["time"]["largest_gap"]
        assert np.diff(ds.time)[gap["row_before"]] == pytest.approx(gap["gap_s"], abs=2e-3)
        assert int((np.diff(ds.time) == 0).sum()) == ref["time"]["n_zero_steps"]
    current = ref.get("current_signed", ref["current"])
    if name.endswith("arbin_example.bdf.csv"): # the file's `Current / A` is wrong by 1000 and must not be what is read
        same(ds.current, current, scale=1000)
        assert (float(ds.current.min()), float(ds.current.max())) == pytest.approx(ref["raw_Current_column_min_max"], rel=1e-6)
    elif current is None: same(ds.current[1:], ref["current_from_dq"], scale=1e-3, floor=1e-12)
    else: same(ds.current, current, scale=1e-3 if current["unit"] == "mA" else 1.0)
    assert (ds.voltage.units, ds.current.units, ds.capacity.units, ds.time.units) == ("V", "A", "Ah", "s")


@needs_data
@pytest.mark.parametrize("name", names(), ids=lambda n: n.split("/")[-1])
def test_samples_cycles_steps_and_start_agree_with_the_oracle(name, tmp_path):
    ref, ds = oracle("echem")["files"][name], read_named(name, tmp_path)
    if samples := ref.get("samples"):
        rows = samples["row"]
        assert ds.time.values[rows] == pytest.approx(samples.get("time_s", samples.get("total_time_s")), rel=1e-6, abs=2e-3)
        assert ds.voltage.values[rows] == pytest.approx(samples["voltage_V"], rel=1e-6)
        for key, scale in (("current_mA", 1e-3), ("current_A", 1.0), ("current", 1000.0 if name.endswith("arbin_example.bdf.csv") else 1.0)):
            if key in samples: assert ds.current.values[rows] == pytest.approx(np.array(samples[key])*scale, rel=1e-6, abs=1e-12)
        for key in ("cycle", "step"):
            if key in samples: assert ds[key].values[rows].tolist() == samples[key]
    cycles = ref.get("cycles", ref.get("cycle_number_values", ref.get("cycles_Cycle_C")))
    cycles = cycles["values"] if isinstance(cycles, dict) else cycles
    if cycles is not None:
        first = 1 if name.endswith("arbin_example.bdf.csv") else cycles[0] # Cycle_Index, from 1, is taken
        assert np.unique(ds.cycle).tolist() == [c - cycles[0] + first for c in cycles]
    steps = ref.get("steps", ref.get("Ns_values"))
    steps = steps["values"] if isinstance(steps, dict) else steps
    if steps is not None: assert np.unique(ds.step).tolist() == steps
    stamp = next((ref[k] for k in ("start_time_local_no_timezone", "start_timestamp", "start_time_from_DateTime_excel_serial_day") if ref.get(k)), None)
    if stamp is None: assert "start_time" not in ds.attrs
    else:
        assert pd.Timestamp(ds.start_time) == pd.Timestamp(stamp)
        assert start_instant(ds)[1] == bool(ref.get("timestamp_has_timezone", False))
    for key in ("temperature", "temperature_T1"):
        if key in ref: same(ds.temperature, ref[key])


def per_step(path):
    """Charge by the cycler in each step, straight from its columns: (first row, last row, signed Ah)."""
    ending = path.name.lower()
    if ending.endswith((".nda", ".ndax")):
        import NewareNDA
        df = NewareNDA.read(str(path), log_level="ERROR")
        table = pd.DataFrame({"step": df["Step"], "charge": df["Charge_Capacity(mAh)"]/1e3, "discharge": df["Discharge_Capacity(mAh)"]/1e3})
    elif ending.endswith("arbin_example.bdf.csv"):
        df = pd.read_csv(path)
        table = pd.DataFrame({"step": df["Step Count / 1"], "charge": df["Charge_Capacity"], "discharge": df["Discharge_Capacity"]})
    elif "landt" in ending:
        df = pd.read_csv(path)
        table = pd.DataFrame({"step": df.step_index, "charge": df.charging_capacity_ah, "discharge": df.discharging_capacity_ah})
    elif ending.startswith("maccor"):
        df = pd.read_csv(path, sep="\t", encoding="latin-1", skiprows=13, index_col=False)
        sign = df["Md"].map({"C": 1, "D": -1}).fillna(0)
        table = pd.DataFrame({"step": df.Step, "charge": df["Cap. [Ah]"]*(sign > 0), "discharge": df["Cap. [Ah]"]*(sign < 0)})
    else: return
    blocks = (table.step.diff() != 0).cumsum()
    for _, part in table.groupby(blocks):
        yield part.index[0], part.index[-1], (part.charge.iloc[-1] - part.charge.iloc[0]) - (part.discharge.iloc[-1] - part.discharge.iloc[0])


@needs_data
@pytest.mark.parametrize("name", [n for n in names() if n.split(".")[-1] in ("nda", "ndax") or any(k in n for k in ("arbin_example.bdf", "Landt", "maccor"))], ids=lambda n: n.split("/")[-1])
def test_coulombs_of_each_step_agree_with_the_cycler_to_a_thousandth(name, tmp_path):
    ds = read_named(name, tmp_path)
    outer, _, inner = name.partition("::")
    path, steps = (tmp_path/inner if inner else DATA/outer), 0
    for first, last, charge in per_step(path):
        ours = float(ds.capacity[last] - ds.capacity[first])
        assert ours == pytest.approx(charge, rel=1e-3, abs=1e-9)
        steps += charge != 0
    assert steps >= 2


@needs_data
@pytest.mark.parametrize("name", [n for n in names() if n.endswith((".mpt", ".mpr"))], ids=lambda n: n.split("/")[-1])
def test_coulombs_of_ec_lab_agree_with_its_counter_and_with_the_current(name):
    ref, ds = oracle("echem")["files"][name], read_echem(DATA/name)
    same(ds.capacity, ref["(Q-Qo)/mA.h"], scale=1e-3, floor=1e-12)
    integral = np.concatenate([[0], np.cumsum(ds.current.values[1:]*np.diff(ds.time))])/3600 # each current is the mean since the row before
    assert np.abs(integral - ds.capacity.values).max() < 1e-3*np.ptp(ds.capacity.values)
    assert ds.capacity_check == pytest.approx(1, abs=1e-3)


@needs_data
@pytest.mark.parametrize("file, column", [("sample_data_novonix.csv", "Capacity (Ah)"), ("sample_data_basytec.txt", "Ah[Ah]")])
def test_coulombs_of_novonix_and_basytec_agree_with_their_counter(file, column):
    skip, sep = (20, ",") if "novonix" in file else (12, "\t")
    counter = pd.read_csv(ECHEM/file, skiprows=skip, sep=sep)[column].to_numpy()
    ds = read_echem(ECHEM/file)
    assert ds.capacity.values == pytest.approx(counter - counter[0], rel=1e-9, abs=1e-12)
    assert ds.capacity_check == pytest.approx(1, abs=1e-3)


@needs_data
def test_the_arbin_database_agrees_with_its_converted_csv():
    a, b = read_echem(ECHEM/"arbin_example.res"), read_echem(ECHEM/"arbin_example.bdf.csv")
    top = oracle("echem")["files"]["echem/arbin_example.res"]["capacity_max_Ah"]
    for name in ("time", "voltage", "current", "capacity"): assert a[name].values == pytest.approx(b[name].values, rel=1e-5, abs=1e-10)
    first = a.capacity.where(a.cycle == 1, drop=True) # up by the charge counter, then down by the discharge counter of cycle 1
    assert float(first.max()) == pytest.approx(top["Charge_Capacity"], rel=1e-3)
    assert float(first.max() - first[-1]) == pytest.approx(top["Discharge_Capacity"], rel=1e-3)
    assert any("sorted by Data_Point" in f for f in flags(a))


# --- traps ------------------------------------------------------------------------------------------------------------

@needs_data
def test_the_time_bug_is_mended_row_by_row_and_said():
    name = next(n for n in names() if "Time_Bug" in n)
    ref, ds = oracle("echem")["files"][name], read_echem(DATA/name)
    bug, raw = ref["time_bug"], pd.read_csv(DATA/name)
    rows = bug["bad_rows_index0"]
    t = raw.test_time_second.to_numpy()
    kept = np.setdiff1d(np.arange(t.size), rows)
    assert (ds.time.values[kept] == t[kept]).all() # rows keep their order and their time
    assert (ds.time.values[rows] >= t[np.array(rows) - 1]).all() and (ds.time.values[rows] <= t[np.array(rows) + 1]).all()
    assert np.abs(ds.time.values[rows] - (t[np.array(rows) + 1] - 0.010)).max() <= 0.010 # the oracle's repair lies as close
    assert (ds.voltage.values == raw.voltage_volt.to_numpy()).all() and (ds.step.values == raw.step_index.to_numpy()).all()
    said = next(f for f in flags(ds) if "clock" in f)
    assert f"{bug['n_bad']} single rows" in said and all(str(r) in said for r in rows)
    assert float(ds.current.min()) == pytest.approx(ref["current"]["min"]) and float(ds.current[-1]) < -59
    assert ds.time.values[-1] == pytest.approx(bug["repaired_span_s"])


@needs_data
def test_units_wrong_by_1000_cycles_from_0_rounding_and_empty_temperature_are_said():
    arbin, landt = flags(read_echem(ECHEM/"arbin_example.bdf.csv")), flags(read_echem(next(ECHEM.glob("*Landt*"))))
    for column in ("Current / A", "Charging Capacity / Ah", "Discharging Capacity / Ah"):
        assert any("1000 times" in f and column in f for f in arbin)
    assert any("Cycle Count / 1" in f and "starts at 0" in f for f in arbin)
    assert any("steps of 0.0001 A" in f for f in landt) and any("counters are used" in f for f in landt) and any("temperature" in f for f in landt)
    assert "temperature" not in read_echem(next(ECHEM.glob("*Landt*")))
    assert "counters" in read_echem(next(ECHEM.glob("*Landt*"))).capacity_source


@needs_data
def test_header_of_ec_lab_is_kept_and_not_used():
    for path in (*LNO.glob("*.mpt"), ECHEM/"jdb11-1_c3_gcpl_5cycles_2V-3p8V_C-24_data_C09.mpr"):
        ds = read_echem(path)
        assert (ds.header_active_mass_mg, ds.header_x0) == pytest.approx((7000, 0.9), rel=1e-5)
    assert "18650" in read_echem(next(LNO.glob("*cell4operandoxas_C06.mpt"))).header_comments


@needs_data
def test_lno_files_are_chained_by_their_absolute_start():
    parts = [read_echem(f) for f in sorted(LNO.glob("*.mpt"))]
    both, ref = combine(parts[::-1]), oracle("operando_alignment")["mpt"]
    n = ref["mpt1_rows"]
    assert both.sizes["time"] == sum(p.sizes["time"] for p in parts)
    assert np.diff(both.time.values)[n - 1] == pytest.approx(ref["mpt_gap_s"], abs=1e-3)
    assert both.start_time == parts[0].start_time
    assert both.capacity.values[n] == pytest.approx(parts[0].capacity.values[-1])
    assert float(both.capacity[-1]) == pytest.approx(float(parts[0].capacity[-1] + parts[1].capacity[-1]))
    assert both.half_cycle.values[n - 1] == both.half_cycle.values[n + 6] # the charge goes on
    assert int(both.half_cycle.max()) + 1 == 8 and np.unique(both.cycle).tolist() == [0, 1, 2, 3, 4]
    assert both.cycle.dtype == np.int32 and (np.diff(both.cycle) >= 0).all()
    assert set(both.file.values.tolist()) == {0, 1} and both.attrs["source"] == ", ".join(f.name for f in sorted(LNO.glob("*.mpt")))
    assert any("follows 26.5" in f for f in flags(both))
    samples = oracle("operando_alignment")["result"]["samples"]
    for s in samples: # start stamps against the voltage, as in the oracle
        volt = np.interp(s["seconds_after_first_mpt_start"], both.time.values, both.voltage.values)
        assert volt == pytest.approx(s["voltage_V"], abs=2e-6)
        assert np.interp(s["seconds_after_first_mpt_start"], both.time.values, both.current.values)*1e3 == pytest.approx(s["current_mA"], abs=2e-6)


@needs_data
def test_overlap_missing_start_and_mixed_zones_are_refused():
    mpt = [read_echem(f) for f in sorted(LNO.glob("*.mpt"))]
    with pytest.raises(BattError, match="overlap"): combine([mpt[0], mpt[0]])
    with pytest.raises(BattError, match="when it started"): combine([mpt[0], read_echem(next(ECHEM.glob("*Landt*")))])
    with pytest.raises(BattError, match="time zone"): combine([mpt[0], read_echem(next(ECHEM.glob("TESTCELL*")))])


# --- formats of which no measured file is at hand, from known values ---------------------------------------------------

def known(n=240):
    """One hour of charge, then one of discharge, at 2 mA, every 30 s."""
    t = np.arange(n)*30.0
    step = 1 + (np.arange(n) >= n//2)
    current = np.where(step == 1, 2e-3, -2e-3)
    q = np.concatenate([[0], np.cumsum(current[1:]*30)])/3600
    up = np.maximum.accumulate(np.where(step == 1, q, 0)); down = np.where(step == 2, q[step == 1][-1] - q, 0)
    return pd.DataFrame({"t": t, "step": step, "V": 3.5 + 100*q, "I": current, "up": up, "down": down, "cycle": 1, "q": q})


def check_known(ds, start=None):
    k = known()
    for ours, theirs in (("time", "t"), ("voltage", "V"), ("current", "I"), ("capacity", "q")):
        assert ds[ours].values == pytest.approx(k[theirs].to_numpy(), rel=1e-6, abs=1e-9), ours
    assert ds.step.values.tolist() == k.step.tolist()
    if start: assert ds.start_time == start


def arbin_frame():
    k = known()
    return pd.DataFrame({"Data_Point": np.arange(1, len(k) + 1), "Test_Time(s)": k.t, "Date_Time": pd.Timestamp("2024-02-05T10:00:00") + pd.to_timedelta(k.t, "s"), "Step_Index": k.step,
                         "Cycle_Index": k.cycle, "Current(A)": k.I, "Voltage(V)": k.V, "Charge_Capacity(Ah)": k.up, "Discharge_Capacity(Ah)": k.down})


def test_arbin_csv(tmp_path):
    arbin_frame().to_csv(tmp_path/"a.csv", index=False)
    ds = read_echem(tmp_path/"a.csv")
    assert ds.format == "Arbin csv"
    check_known(ds, "2024-02-05T10:00:00")


def test_arbin_workbook_with_several_sheets(tmp_path):
    frame = arbin_frame()
    with pd.ExcelWriter(tmp_path/"a.xlsx") as w:
        pd.DataFrame({"TEST REPORT": ["Channel", "1"]}).to_excel(w, sheet_name="Global_Info", index=False)
        frame[:100].to_excel(w, sheet_name="Channel_1-001_1", index=False)
        frame[100:].to_excel(w, sheet_name="Channel_1-001_2", index=False)
    ds = read_echem(tmp_path/"a.xlsx")
    assert ds.format == "Arbin .xlsx"
    check_known(ds, "2024-02-05T10:00:00")
    assert any("2 sheets" in f for f in flags(ds))


@pytest.mark.parametrize("spelling", ["machine", "label"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_battery_data_format_in_both_spellings(tmp_path, kind, spelling):
    k = known()
    label = {"t": "Test Time / s", "V": "Voltage / V", "I": "Current / A", "step": "Step Index / 1", "cycle": "Cycle Count / 1", "q": "Net Capacity / Ah", "u": "Unix Time / s"}
    machine = {"t": "test_time_second", "V": "voltage_volt", "I": "current_ampere", "step": "step_index", "cycle": "cycle_count", "q": "net_capacity_ah", "u": "unix_time_second"}
    frame = k.assign(u=1.7e9 + k.t)[list(label)].rename(columns=machine if spelling == "machine" else label)
    path = tmp_path/f"a.bdf.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    ds = read_echem(path)
    assert ds.format == f"Battery Data Format {kind}"
    check_known(ds, "2023-11-14T22:13:20+00:00")


def test_landt_text_export_with_units_in_its_names(tmp_path):
    k = known()
    capacity = np.where(k.step == 1, k.up, k.down)
    pd.DataFrame({"Record": k.index + 1, "TestTime/Sec": k.t, "Voltage/V": k.V, "Current/mA": k.I*1e3, "Capacity/mAh": capacity*1e3, "Cycle-Index": 1, "Step-Index": k.step}).to_csv(tmp_path/"l.csv", index=False)
    check_known(read_echem(tmp_path/"l.csv"))


def test_mpt_with_decimal_point_and_month_that_is_a_guess(tmp_path):
    k = known()
    rows = "\r\n".join(f"{s}\t{t:.6E}\t{v:.7E}\t{i*1e3:.9E}\t{q*1e3:.9E}\t" for s, t, v, i, q in zip(k.step, k.t, k.V, k.I, k.q))
    text = f"EC-Lab ASCII FILE\r\nNb header lines : 6\r\n\r\nGCPL\r\nAcquisition started on : 05/06/2022 10:00:00.000\r\nNs\ttime/s\tEwe/V\t<I>/mA\t(Q-Qo)/mA.h\t\r\n{rows}"
    path = tmp_path/"été \"µ\" <b>.mpt"
    path.write_bytes(text.encode("latin-1"))
    ds = read_echem(path)
    check_known(ds, "2022-05-06T10:00:00")
    assert any("month first" in f for f in flags(ds)) and ds.source == path.name
    assert read_echem(path, day_first=True).start_time == "2022-06-05T10:00:00"


def test_any_csv_with_a_column_map(tmp_path):
    k = known()
    pd.DataFrame({"Zeit": k.t/3600, "Ewe (mV)": k.V*1e3, "Strom": k.I*1e6, "Schritt": k.step}).to_csv(tmp_path/"a.csv", sep=";", decimal=",", index=False)
    columns = {"time": "Zeit", "voltage": "Ewe (mV)", "current": "Strom", "step": "Schritt"}
    ds = read_echem(tmp_path/"a.csv", columns=columns, units={"time": "h", "current": "µA"})
    assert ds.current.values == pytest.approx(k.I.to_numpy()) and ds.voltage.values == pytest.approx(k.V.to_numpy())
    with pytest.raises(BattError, match="'Strom' does not say its unit") as e: read_echem(tmp_path/"a.csv", columns=columns, units={"time": "h"})
    assert e.value.key == "units.current" and "µa" in e.value.mend
    with pytest.raises(BattError, match="'Spannung'"): read_echem(tmp_path/"a.csv", columns=columns | {"voltage": "Spannung"})
    turned = read_echem(tmp_path/"a.csv", columns=columns, units={"time": "h", "current": "µA"}, sign=-1)
    assert turned.current.values == pytest.approx(-ds.current.values) and turned.capacity.values == pytest.approx(-ds.capacity.values)


@needs_data
def test_columns_by_position_in_a_file_without_header(tmp_path):
    with zipfile.ZipFile(next((DATA/"campaigns/nmc622-operando-nmr/raw").glob("*.zip"))) as z:
        path = z.extract(next(n for n in z.namelist() if n.endswith("POL.txt") and "__MACOSX" not in n), tmp_path)
    ds = read_echem(path, columns={"time": 0, "voltage": 1, "current": 2}, units={"time": "h", "voltage": "V", "current": "mA"})
    raw = np.loadtxt(path)
    assert ds.time.values == pytest.approx(raw[:, 0]*3600) and ds.current.values == pytest.approx(raw[:, 2]/1e3)
    with pytest.raises(BattError, match="hold the time"): read_echem(path, columns={"voltage": 1, "current": 2}, units={"voltage": "V", "current": "mA"})
    with pytest.raises(BattError): read_echem(path)


# --- bad input --------------------------------------------------------------------------------------------------------

@needs_data
@pytest.mark.parametrize("part", [0.001, 0.0029, 0.01, 0.5, 0.9, 0.993, 0.9999])
def test_a_truncated_mpr_is_refused(tmp_path, part):
    whole = next(ECHEM.glob("*.mpr")).read_bytes()
    (tmp_path/"cut.mpr").write_bytes(whole[:int(part*len(whole))])
    with pytest.raises(BattError, match="cut.mpr") as e: read_echem(tmp_path/"cut.mpr")
    assert "cut short" in str(e.value) and e.value.mend


@needs_data
def test_an_mpr_without_its_log_is_read_and_says_that_it_has_no_start(tmp_path):
    whole = next(ECHEM.glob("*.mpr")).read_bytes()
    (tmp_path/"running.mpr").write_bytes(whole[:whole.rindex(b"MODULE")])
    ds = read_echem(tmp_path/"running.mpr")
    assert "start_time" not in ds.attrs and any("no log module" in f for f in flags(ds))


@needs_data
@pytest.mark.parametrize("part", [0.1, 0.33, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("name", ["test.ndax", "test.nda", "arbin_example.res"])
def test_other_truncated_binaries_are_refused(tmp_path, name, part):
    whole = (ECHEM/name).read_bytes()
    (tmp_path/name).write_bytes(whole[:int(part*len(whole))])
    with pytest.raises(BattError, match="cut short") as e: read_echem(tmp_path/name)
    assert e.value.file == name and e.value.mend


@pytest.mark.parametrize("name", ["a.mpr", "a.mpt", "a.ndax", "a.res", "a.csv"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path/name).write_bytes(b"")
    with pytest.raises(BattError, match="empty"): read_echem(tmp_path/name)
    for f in READER.formats:
        if name in f.suffixes[0]:
            with pytest.raises(BattError, match="empty"): f.read(tmp_path/name)


@needs_data
@pytest.mark.parametrize("name, wrong", [("maccor_002.txt", "x.mpr"), ("test.ndax", "x.csv"), ("test.nda", "x.ndax"), ("sample_data_novonix.csv", "x.mpt"), ("arbin_example.res", "x.nda")])
def test_the_content_decides_not_the_ending(tmp_path, name, wrong):
    (tmp_path/wrong).write_bytes((ECHEM/name).read_bytes())
    a, b = read_echem(ECHEM/name), read_echem(tmp_path/wrong)
    assert a.format == b.format and (a.voltage.values == b.voltage.values).all()


@needs_data
def test_each_file_is_claimed_by_the_format_of_its_maker_first():
    expect = {"maccor": "Maccor text", "novonix": "Novonix csv", "basytec": "Basytec text", ".mpr": "BioLogic .mpr", ".nda": "Neware .nda", ".res": "Arbin .res", "Landt": "Battery Data Format csv", "Time_Bug": "Battery Data Format csv", "arbin_example.bdf": "Arbin csv"}
    for path in ECHEM.iterdir():
        head = path.read_bytes()[:4096]
        first = next(name for name, _, _, sniff, _, _ in CYCLERS if sniff(path, head))
        key = next(k for k in expect if k in path.name)
        assert first.startswith(expect[key]), path.name


def test_a_missing_unit_names_the_column(tmp_path):
    (tmp_path/"a.csv").write_text("Test Time / s,Voltage / V,Current\n0,3,1\n1,3,1\n", encoding="utf-8")
    with pytest.raises(BattError, match="'Current' does not say its unit") as e: read_echem(tmp_path/"a.csv")
    assert e.value.key == "units.current" and e.value.file == "a.csv"


def test_nan_rows_are_dropped_and_counted_and_a_wrong_column_refused(tmp_path):
    rows = [f"{t},{'' if t in (3, 7) else 3.5},0.001" for t in range(20)] + ["end of file,,"]
    (tmp_path/"a.csv").write_text("test_time_second,voltage_volt,current_ampere\n" + "\n".join(rows), encoding="utf-8")
    ds = read_echem(tmp_path/"a.csv")
    assert ds.sizes["time"] == 18 and any("3 rows without" in f and "3, 7, 20" in f for f in flags(ds))
    (tmp_path/"b.csv").write_text("test_time_second,voltage_volt,current_ampere\n" + "\n".join(f"{t},,1" for t in range(9)), encoding="utf-8")
    with pytest.raises(BattError, match="no number for voltage"): read_echem(tmp_path/"b.csv")


def test_unsorted_and_repeated_times(tmp_path):
    t = [0, 1, 2, 2, 3, 9, 4, 5, 6, 7]
    (tmp_path/"a.csv").write_text("test_time_second,voltage_volt,current_ampere\n" + "\n".join(f"{x},3.5,{i}" for i, x in enumerate(t)), encoding="utf-8")
    ds = read_echem(tmp_path/"a.csv")
    assert ds.current.values.tolist() == list(range(10)) # rows keep their order
    assert ds.time.values.tolist() == [0, 1, 2, 2, 3, 3.5, 4, 5, 6, 7]
    assert any("row 5" in f for f in flags(ds)) and any("time of the row before" in f and "row 3" in f for f in flags(ds))


def test_a_clock_that_starts_again_goes_on_and_its_pause_is_put_in_where_stamps_know_it(tmp_path):
    t = np.concatenate([np.arange(50.0), np.arange(50.0)])
    mended, said = mend_clock(t)
    assert (mended == np.arange(100)).all() and "row 50" in said[0]
    wall = np.datetime64("2024-01-01", "ns") + ((np.arange(100) + 600.0*(np.arange(100) >= 50))*1e9).astype("timedelta64[ns]")
    true, more = check_stamps(mended, wall)
    assert true[-1] == 699 and "600 s" in more[0]


def test_the_fewest_rows_are_doubted():
    rng = np.random.default_rng(0)
    for _ in range(50):
        t = np.sort(rng.uniform(0, 1e5, 400)); bad = rng.choice(np.arange(1, 399), 6, replace=False)
        wrong = t.copy(); wrong[bad] = rng.choice([0.0, 2e5], 6)
        kept = wrong[~doubted(wrong)]
        assert (np.diff(kept) >= 0).all() and doubted(wrong).sum() <= 6


def test_current_and_counter_that_contradict_by_1000_are_said(tmp_path):
    k = known()
    pd.DataFrame({"Test Time (s)": k.t, "Voltage (V)": k.V, "Current (A)": k.I*1e3, "Charge Capacity (Ah)": k.up, "Discharge Capacity (Ah)": k.down}).to_csv(tmp_path/"a.csv", index=False)
    ds = read_echem(tmp_path/"a.csv")
    assert any("factor of 1000" in f or "factor of 999" in f or "factor of 1004" in f for f in flags(ds)) and ds.capacity_check == pytest.approx(1000, rel=0.02)
    assert read_echem(tmp_path/"a.csv", units={"current": "mA"}).capacity.values == pytest.approx(k.q.to_numpy(), abs=1e-9)


def test_unsigned_and_inverted_currents_are_turned(tmp_path):
    k = known()
    for current in (k.I.abs(), -k.I):
        pd.DataFrame({"Test Time (s)": k.t, "Voltage (V)": k.V, "Current (A)": current, "Charge Capacity (Ah)": k.up, "Discharge Capacity (Ah)": k.down, "Step": k.step}).to_csv(tmp_path/"a.csv", index=False)
        ds = read_echem(tmp_path/"a.csv")
        assert ds.current.values == pytest.approx(k.I.to_numpy()) and any("sign" in f for f in flags(ds))


def test_decimal_commas_between_commas_are_refused(tmp_path):
    (tmp_path/"a.csv").write_text("Test Time (s),Voltage (V),Current (A)\n" + "0,0,3,5,0,1\n"*4, encoding="utf-8")
    with pytest.raises(BattError, match="rows hold 6 cells"): read_echem(tmp_path/"a.csv")


def test_a_missing_library_is_answered_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "access_parser", None)
    (tmp_path/"a.res").write_bytes(b"\0\1\0\0Standard Jet DB\0" + bytes(5000))
    with pytest.raises(BattError, match=r"batt_nb\[arbin\]"): read_echem(tmp_path/"a.res")
    monkeypatch.setitem(sys.modules, "galvani.BioLogic", None)
    (tmp_path/"a.mpr").write_bytes(b"BIO-LOGIC MODULAR FILE\x1a".ljust(52, b"\0"))
    with pytest.raises(BattError, match=r"batt_nb\[cyclers\]"): read_echem(tmp_path/"a.mpr")


# --- memory -----------------------------------------------------------------------------------------------------------

# getrusage's ru_maxrss of a child starts at its parent's peak; VmHWM is the process's own
PEAK = """
import sys
from batt_nb.campaign.electrochemistry import read_echem
ds = read_echem(sys.argv[1])
print(ds.sizes["time"], float(ds.capacity[-1]), next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))/1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
@pytest.mark.parametrize("kind", ["csv", "mpt"])
def test_a_million_rows_stay_below_one_gigabyte(tmp_path, kind):
    n = 1_000_000
    t, path = np.arange(n)*1.0, tmp_path/f"big.{kind}"
    with open(path, "w", encoding="latin-1", newline="") as f:
        if kind == "mpt":
            f.write("EC-Lab ASCII FILE\r\nNb header lines : 6\r\n\r\nGCPL\r\nAcquisition started on : 07/26/2022 10:00:00.000\r\nmode\tNs\ttime/s\tcontrol/V/mA\tEwe/V\t<I>/mA\t(Q-Qo)/mA.h\tx\tCapacitance charge/µF\t\r\n")
            row, end = "1\t1\t%.15E\t1,0000000E+000\t3,5000000E+000\t1,000000000000000E+000\t%.15E\t8,999999761581421E-001\t0,000000000000000E+000\t\r\n", 100_000
            for i in range(0, n, end): f.write("".join(row % (x, x/3600) for x in t[i:i + end]).replace(".", ","))
        else:
            f.write("Data_Point,Test_Time(s),Date_Time,Step_Time(s),Step_Index,Cycle_Index,Current(A),Voltage(V),Charge_Capacity(Ah),Discharge_Capacity(Ah),Charge_Energy(Wh),dV/dt(V/s)\r\n")
            for i in range(0, n, 100_000):
                stamp = pd.date_range("2024-01-01", periods=100_000, freq="s").shift(i, freq="s").strftime("%m/%d/%Y %H:%M:%S")
                f.write("".join(f"{int(x) + 1},{x:.6f},{s},{x:.6f},1,1,0.001,3.512345,{x/3.6e6:.12f},0.0,0.123456789,0.0001\r\n" for x, s in zip(t[i:i + 100_000], stamp)))
    out = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr[-2000:]
    rows, charge, peak = out.stdout.split()
    assert int(rows) == n and float(charge) == pytest.approx((n - 1)/3.6e6, rel=1e-6)
    print(f"{kind}: {Path(path).stat().st_size/1e6:.0f} MB on disk, {float(peak):.0f} MiB at the peak")
    assert float(peak) < 1000
