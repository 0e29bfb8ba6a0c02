#!/usr/bin/env python
"""Write a small simulated campaign whose truth is known: five sister NMC811/Li half-cells, one technique each.

    python data_samples/make_sample.py [folder] [--seed 11]

The same seed gives the same bytes. The numbers are realistic in size (about 200 mAh/g between 3.0 and 4.3 V, Ni K edge near 8344 eV, lattice
parameters of NMC811, static 7Li spectra), but the curves are drawn, not computed from first principles: the campaign shows and tests how
data are read, joined and displayed; it is no reference for the physics of NMC811. What every cell and frame really was stands in truth.json.
"""
import argparse
import hashlib
import json
import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np

FORMULA, MOLAR_MASS = "LiNi0.8Mn0.1Co0.1O2", 97.28  # g/mol
CAPACITY = 96485.332 / 3.6 / MOLAR_MASS  # mAh/g for a change of 1 in x
RATE = 20.0  # mA per gram of weighed active mass: about C/10
ZONE = timezone(timedelta(hours=1))  # Europe/Berlin in March, before the 29th
XAS_CLOCK = 42.0  # s by which the beamline's clock is ahead of the cycler's
CELLS = {  # start of the cycler (local time), weighed mass (mg), frames: first (s), cadence (s), exposure (s), number
    "A": (datetime(2026, 3, 16, 9, 0), 10.4, None),
    "B": (datetime(2026, 3, 18, 14, 0), 10.2, (300, 3540, 600, 40)),
    "C": (datetime(2026, 3, 21, 8, 30), 9.7, (420, 3540, 60, 40)),
    "D": (datetime(2026, 3, 23, 17, 0), 11.1, (900, 7080, 3600, 20)),
    "E": (datetime(2026, 3, 25, 10, 15), 10.0, (600, 8850, 300, 16)),
}
LOST = 24  # the spectrum of cell B that a beam dump took


# ---- the electrode ----------------------------------------------------------------------------------------------------------------------

def open_circuit(x):
    """Open-circuit voltage (V against Li) at lithium content x: four sites that empty one after the other."""
    volt = np.linspace(2.6, 4.9, 4601)
    sites = ((0.24, 3.665, 0.030), (0.18, 3.770, 0.045), (0.17, 3.985, 0.055), (0.13, 4.185, 0.018), (0.28, 4.560, 0.100))  # share, V, V
    empty = sum(w/(1 + np.exp(-(volt - v)/s)) for w, v, s in sites)
    return np.interp(1 - x, empty, volt)


def overvoltage(x, current, r):
    """Polarization (V): an even resistance r (V per mA/g), and the slow lithium uptake of the nearly full electrode."""
    return current*r*(1 + (current < 0)*np.exp((x - 0.895)/0.014))


def cycle_cell(rng, weighed):
    """Rest, then twice: charge to 4.3 V, rest, discharge to 3.0 V, rest; a row every 120 s and at each step's end."""
    truth = {"active_mass_mg": round(weighed + 0.1*rng.standard_normal(), 4), "starting_composition": round(0.985 + 0.008*rng.standard_normal(), 4),
             "resistance_mV_per_mA_g": round(1.5 + 0.4*rng.standard_normal(), 4), "weighed_mass_mg": weighed}
    current = round(RATE*weighed*1e-3, 3)  # mA
    r, per_s = truth["resistance_mV_per_mA_g"]*1e-3, current/3600/(truth["active_mass_mg"]*1e-3*CAPACITY)  # change of x a second
    x, t, rows = truth["starting_composition"], 0.0, []
    plan = [(0, 600)] + [(1, 4.3), (0, 1800), (-1, 3.0), (0, 1800)]*2
    polarized = 0.0
    for number, (sign, end) in enumerate(plan):
        fine = np.arange(0, 200_000 if sign else end + 1.0)
        path = x - sign*per_s*fine
        eta = overvoltage(path, sign*RATE, r) if sign else polarized*np.exp(-fine/600)
        volt = open_circuit(path) + eta
        last = np.argmax(sign*volt >= sign*end) if sign else len(fine) - 1
        pick = np.unique(np.append(np.arange(1 if rows else 0, last, 120), last))
        rows.append(np.c_[t + fine[pick], volt[pick], np.full(len(pick), sign*current), path[pick], np.full(len(pick), number + 1),
                          np.full(len(pick), 1 + (number > 4))])
        t, x, polarized = t + fine[last], path[last], eta[last]
    time, volt, amp, x, step, cycle = np.concatenate(rows).T
    volt = volt + 2e-4*rng.standard_normal(len(volt))
    charge = np.concatenate([[0], np.cumsum(np.diff(time)*amp[1:])])/3600  # mAh
    truth |= {"current_mA": current, "duration_s": float(time[-1]), "capacity_mAh_g_first_charge": round(float(charge.max()/weighed*1e3), 2)}
    return {"time": time, "voltage": volt, "current": amp, "charge": charge, "x": x, "step": step.astype(int), "cycle": cycle.astype(int)}, truth


# ---- the cyclers' files -----------------------------------------------------------------------------------------------------------------

def write_mpt(path, e, start, name):
    """BioLogic text: latin-1, CRLF, tabs."""
    head = ["EC-Lab ASCII FILE", "", "", "Galvanostatic Cycling with Potential Limitation", "", f"Acquisition started on : {start:%m/%d/%Y %H:%M:%S}.000",
            "Device : simulated (SN 0000)", f"Comments : simulated NMC811/Li half-cell {name}, 25 °C", "Electrode surface area : 1.131 cm²", "Cycle Definition : Charge/Discharge alternance", ""]
    columns = ["mode", "ox/red", "error", "Ns", "time/s", "(Q-Qo)/mA.h", "Ewe/V", "<I>/mA", "half cycle", "cycle number"]
    half = np.maximum.accumulate(np.where(e["current"] != 0, (e["step"] - 2)//2, 0))
    rows = ["\t".join(["1" if i else "3", "1" if i >= 0 else "0", "0", str(s - 1), f"{t:.4f}", f"{q:.6f}", f"{v:.5f}", f"{i:.6f}", str(h), f"{c:d}"]) + "\t"
            for t, v, i, q, s, h, c in zip(*(e[k] for k in ("time", "voltage", "current", "charge", "step")), half, e["cycle"], strict=True)]
    head[1] = f"Nb header lines : {len(head) + 1}"
    path.write_bytes("\r\n".join([*head, "\t".join(columns) + "\t", *rows, ""]).encode("latin-1"))


def write_bdf(path, e, start, name):
    """Battery Data Format, csv."""
    stamp = start.replace(tzinfo=ZONE).timestamp()
    rows = [f"{t:.3f},{v:.5f},{i*1e-3:.9f},{stamp + t:.3f},{c},{s}" for t, v, i, c, s in zip(*(e[k] for k in ("time", "voltage", "current", "cycle", "step")), strict=True)]
    path.write_bytes("\n".join(["Test Time / s,Voltage / V,Current / A,Unix Time / s,Cycle Count / 1,Step Count / 1", *rows, ""]).encode())


def write_novonix(path, e, start, name):
    """Novonix csv: hours, a summary above the table."""
    head = ["[Summary]", "Novonix UHPC data file", "Novonix", "Channel: 01", f"Cell: simulated NMC811/Li half-cell {name}", "Capacity (Ah): 0.002", f"Started: {start:%Y-%m-%d %H:%M:%S}",
            "Version: 2.13.0", "[End Summary]", "[Data]", "Date and Time,Cycle Number,Step Type,Run Time (h),Step Time (h),Current (A),Potential (V),Capacity (Ah),Temperature (°C),Step Number"]
    begin = {s: e["time"][e["step"] == s][0] for s in np.unique(e["step"])}
    rows = [f"{start + timedelta(seconds=round(t)):%Y-%m-%d %H:%M:%S},{c},{0 if i == 0 else 1 if i > 0 else 2},{t/3600:.7f},{(t - begin[s])/3600:.7f},{i*1e-3:.9f},{v:.6f},{abs(q)*1e-3:.9f},25.000,{s}"
            for t, v, i, q, c, s in zip(*(e[k] for k in ("time", "voltage", "current", "charge", "cycle", "step")), strict=True)]
    path.write_bytes("\n".join([*head, *rows, ""]).encode())


# ---- the techniques' files --------------------------------------------------------------------------------------------------------------

def edge(energy, e0, white):
    """Absorption edge: arctan step, white line, one damped EXAFS wave."""
    k = np.sqrt(0.2625*np.maximum(energy - e0, 0))
    return 0.5 + np.arctan((energy - e0)/0.9)/np.pi + white*np.exp(-((energy - e0 - 5.5)/3.2)**2) + 0.09*np.sin(2*1.75*k + 2.1)*np.exp(-0.12*k)/(1 + np.exp(-(energy - e0 - 16)/3))


def write_xas(folder, rng, times, x, start, exposure):
    """Ni K edge, XDI, one file a spectrum; the beamline's clock is ahead of the cycler's."""
    energy = np.concatenate([np.arange(8240, 8325, 5.0), np.arange(8325, 8375, 0.4), np.arange(8375, 8520, 2.5)])
    foil = edge(energy, 8335.0, 0.0) + 0.12*np.exp(-((energy - 8334)/1.5)**2)
    head = "# XDI/1.0 simulated\n# Column.1: energy eV\n# Column.2: i0\n# Column.3: mutrans\n# Column.4: murefer\n# Element.symbol: Ni\n# Element.edge: K\n" \
           "# Mono.name: Si 111\n# Mono.d_spacing: 3.13550\n# Facility.name: simulated\n# Sample.name: NMC811/Li half-cell B\n# Sample.stoichiometry: {}\n# Scan.start_time: {}\n# Scan.end_time: {}\n# ///\n# spectrum {} of {}\n#----\n# energy i0 mutrans murefer\n"
    for n, (t, xi) in enumerate(zip(times, x, strict=True), 1):
        begin = start + timedelta(seconds=float(t) + XAS_CLOCK)
        mu = 0.35 - 2.0e-4*(energy - 8340) + 0.95*edge(energy, 8343.2 + 2.4*(1 - xi), 0.42 + 0.10*xi) + 1.2e-3*rng.standard_normal(len(energy))
        ref = 0.20 + 0.60*foil + 1.5e-3*rng.standard_normal(len(energy))
        i0 = 2.4e5*(1 - 0.02*np.sin(t/7200)) + 150*rng.standard_normal(len(energy))
        if n == LOST: continue
        body = "".join(f"{e:.1f} {i:.0f} {m:.5f} {r:.5f}\n" for e, i, m, r in zip(energy, i0, mu, ref, strict=True))
        (folder/f"cell_B_Ni_{n:03d}.xdi").write_bytes((head.format(FORMULA, begin.isoformat(sep=" "), (begin + timedelta(seconds=exposure)).isoformat(sep=" "), n, len(times)) + body).encode())


def lattice(x):
    """Lattice parameters a and c (Å): a shrinks, c grows and then collapses."""
    return np.interp(x, [0.20, 0.35, 1.0], [2.812, 2.817, 2.872]), np.interp(x, [0.20, 0.28, 0.36, 0.50, 0.75, 1.0], [13.78, 14.08, 14.34, 14.44, 14.35, 14.19])


def write_xrd(folder, rng, x):
    """Powder patterns at 0.5 Å as .xye: pseudo-Voigt peaks of the layered phase, and of the aluminium collector, which stays."""
    angle = 5.5 + 0.02*np.arange(800)
    peaks = {(0, 0, 3): 100, (1, 0, 1): 38, (0, 0, 6): 8, (1, 0, 2): 13, (1, 0, 4): 62, (1, 0, 5): 14, (1, 0, 7): 16, (1, 0, 8): 18, (1, 1, 0): 20, (1, 1, 3): 15}
    def voigt(centre, width=0.07): u = (angle - centre)/(width/2); return 0.5/(1 + u**2) + 0.5*np.exp(-np.log(2)*u**2)
    for n, xi in enumerate(x, 1):
        a, c = lattice(xi)
        d = [1/np.sqrt(4/3*(h*h + h*k + k*k)/a**2 + m*m/c**2) for h, k, m in peaks]
        y = 260*np.exp(-(angle - 5.5)/6) + 90 + 45*sum(i*voigt(2*np.degrees(np.arcsin(0.25/di))) for i, di in zip(peaks.values(), d, strict=True))
        y = rng.poisson(y + 1200*voigt(2*np.degrees(np.arcsin(0.25/2.338))))
        (folder/f"cell_C_{n:03d}.xye").write_bytes("".join(f"{t:.2f} {v:d} {np.sqrt(max(v, 1)):.1f}\n" for t, v in zip(angle, y, strict=True)).encode())


def write_nmr(folder, rng, times, x, start, exposure):
    """Static 7Li spectra as Bruker folders: electrolyte at 0 ppm, growing lithium microstructure at 265 ppm, the cathode's broad line."""
    mhz, width, points, delay = 116.642, 250_000.0, 512, 68  # Larmor frequency, spectral width (Hz), complex points, points of group delay
    t = np.arange(points - delay)/width
    for n, (at, xi) in enumerate(zip(times, x, strict=True), 1):
        lines = ((1.0, 0.0, 8.0), (0.10 + 0.30*(1 - xi), 265.0, 22.0), (6.0*xi, 180 + 360*xi, 190.0))  # area, ppm, full width in ppm
        fid = sum(a*np.exp((2j*np.pi*p - np.pi*w)*mhz*t) for a, p, w in lines)*1e5 + 900*(rng.standard_normal(t.size) + 1j*rng.standard_normal(t.size))
        raw = np.round(np.concatenate([np.zeros(delay), fid])).astype("complex128").view("f8").astype("<i4")
        (folder/str(n)/"pdata"/"1").mkdir(parents=True)
        (folder/str(n)/"fid").write_bytes(raw.tobytes())
        begin = (start + timedelta(seconds=float(at))).replace(tzinfo=ZONE).astimezone(timezone.utc)
        end = begin + timedelta(seconds=exposure)
        pairs = {"AQ_mod": 3, "BF1": mhz, "BYTORDA": 0, "D": "(0..1)\n0 1", "DATE": int(end.timestamp()), "DECIM": 80, "DSPFVS": 20, "DTYPA": 0, "GRPDLY": delay, "NS": 3600, "NUC1": "<7Li>", "O1": 0,
                 "PARMODE": 0, "PULPROG": "<zg>", "RG": 101, "SFO1": mhz, "SW": width/mhz, "SW_h": width, "TD": 2*points, "TE": 298}
        (folder/str(n)/"acqus").write_bytes(("##TITLE= Parameter file, simulated\n##JCAMPDX= 5.0\n##DATATYPE= Parameter Values\n##ORIGIN= simulated\n##OWNER= batt_nb\n"
            f"$$ {end:%Y-%m-%d %H:%M:%S}.000 +0000  simulated\n" + "".join(f"##${k}= {v}\n" for k, v in pairs.items()) + "##END=\n").encode())
        (folder/str(n)/"pdata"/"1"/"procs").write_bytes(f"##TITLE= Processing parameters, simulated\n##JCAMPDX= 5.0\n##DATATYPE= Parameter Values\n##ORIGIN= simulated\n##OWNER= batt_nb\n##$SF= {mhz}\n##$SI= 1024\n##$SW_p= {width}\n##END=\n".encode())
        (folder/str(n)/"audita.txt").write_bytes(("##TITLE= Audit trail, simulated\n##JCAMPDX= 5.01\n##ORIGIN= simulated\n##OWNER= batt_nb\n##AUDIT TRAIL=  $$ (NUMBER, WHEN, WHO, WHERE, PROCESS, VERSION, WHAT)\n"
            f"(   1,<{end:%Y-%m-%d %H:%M:%S}.000 +0000>,<batt_nb>,<simulated>,<go>,<simulated>,\n      <created by zg\n\tstarted at {begin:%Y-%m-%d %H:%M:%S}.000 +0000>)\n##END=\n").encode())


def write_xct(folder, rng, x):
    """Slices of particles in a binder matrix, one TIFF a frame, whose grey falls a little as lithium leaves."""
    import tifffile
    y, xx = np.mgrid[:128, :128]
    places = rng.uniform(0, 128, (60, 2)); radii = rng.uniform(5, 13, 60)
    for n, xi in enumerate(x):
        image = 9000.0 + 0*y
        for (cy, cx), radius in zip(places, radii, strict=True):
            inside = 1/(1 + np.exp((np.hypot(y - cy, xx - cx) - radius*(1 - 0.02*(1 - xi)))/0.6))
            image = np.maximum(image, 9000 + inside*(24000 - 2600*(1 - xi)))
        image = np.clip(np.round(image + 700*rng.standard_normal(image.shape)), 0, 65535).astype("<u2")
        tifffile.imwrite(folder/f"cell_E_{n:03d}.tif", image, byteorder="<", metadata=None, software=False, datetime=False, description=None)


# ---- the campaign -----------------------------------------------------------------------------------------------------------------------

MANIFEST = """# A simulated campaign with known truth (truth.json), made by make_sample.py with seed {seed}.
[campaign]
name = "NMC811 sample"
description = "Five simulated sister half-cells of one electrode batch, one technique each, same protocol."
license = "CC0-1.0"
authors = ["batt_nb developers"]

{cells}
[techniques.echem_A]      # the control cell: cycled in the laboratory, no beam
cell = "A"
files = ["raw/echem/cell_A.mpt"]

[techniques.echem_B]
cell = "B"
files = ["raw/echem/cell_B.mpt"]

[techniques.echem_C]
cell = "C"
files = ["raw/echem/cell_C.bdf.csv"]

[techniques.echem_D]
cell = "D"
files = ["raw/echem/cell_D_novonix.csv"]
[techniques.echem_D.clock]
timezone = "Europe/Berlin"   # its stamps have no zone; the spectrometer's are UTC

[techniques.echem_E]
cell = "E"
files = ["raw/echem/cell_E.mpt"]

[techniques.xas]
cell = "B"
files = ["raw/xas/*.xdi"]
scale = "atomic"
[techniques.xas.clock]
offset_s = -42.0             # the beamline's clock was 42 s ahead of the cycler's
exposure_s = {xas[2]:.1f}
[techniques.xas.beam]
spot_um = 100.0

[techniques.xrd]
cell = "C"
files = ["raw/xrd/*.xye"]
scale = "atomic"
[techniques.xrd.clock]       # the patterns carry no time: a pattern every {xrd[1]} s from here
start = "{xrd_start}"
frame_time_s = {xrd[1]:.1f}
exposure_s = {xrd[2]:.1f}
[techniques.xrd.beam]
wavelength_A = 0.5

[techniques.nmr]
cell = "D"
files = ["raw/nmr/*"]
scale = "atomic"

[techniques.xct]
cell = "E"
files = ["raw/xct/*.tif"]
scale = "electrode"
[techniques.xct.clock]       # the images carry no time either
start = "{xct_start}"
frame_time_s = {xct[1]:.1f}
exposure_s = {xct[2]:.1f}
[techniques.xct.hints]
pixel_size_um = 0.65
"""

CELL = """[cells.{name}]
electrode_material = "{formula}"
electrode_batch = "sample-{seed}"
active_mass_mg = {mass}
active_mass_sigma_mg = 0.1
counter_electrode = "Li"
voltage_window_V = [3.0, 4.3]
starting_composition = 0.985
starting_composition_sigma = 0.01
protocol = "C/10 CC, 2 cycles, 30 min rests"
"""


def make_sample(folder, seed=11):
    """Write the campaign into a folder, replacing what an earlier run wrote there."""
    folder = Path(folder)
    if (folder/"raw").exists(): shutil.rmtree(folder/"raw")
    for part in ("echem", "xas", "xrd", "nmr", "xct"): (folder/"raw"/part).mkdir(parents=True)
    raw, truth = folder/"raw", {"note": "simulated and illustrative; x is the lithium content in the middle of each frame, t its start on the cycler's clock (s)", "seed": seed, "clock_ahead_s": {"xas": XAS_CLOCK}, "cells": {}, "frames": {}}
    for name, (start, weighed, frames) in CELLS.items():
        rng = np.random.default_rng([seed, ord(name)])
        e, truth["cells"][name] = cycle_cell(rng, weighed)
        writer, ending = {"C": (write_bdf, ".bdf.csv"), "D": (write_novonix, "_novonix.csv")}.get(name, (write_mpt, ".mpt"))
        writer(raw/"echem"/f"cell_{name}{ending}", e, start, name)
        if frames is None: continue
        first, cadence, exposure, count = frames
        times = first + cadence*np.arange(count)
        x = np.interp(times + exposure/2, e["time"], e["x"])
        technique = {"B": "xas", "C": "xrd", "D": "nmr", "E": "xct"}[name]
        truth["frames"][technique] = {"cell": name, "t": times.tolist(), "exposure_s": exposure, "x": np.round(x, 5).tolist(), "lost": [LOST] if name == "B" else []}
        if name == "B": write_xas(raw/"xas", rng, times, x, start, exposure)
        if name == "C": write_xrd(raw/"xrd", rng, x)
        if name == "D": write_nmr(raw/"nmr", rng, times, x, start, exposure)
        if name == "E": write_xct(raw/"xct", rng, x)
    begin = lambda cell: CELLS[cell][0] + timedelta(seconds=CELLS[cell][2][0])
    manifest = MANIFEST.format(seed=seed, cells="\n".join(CELL.format(name=n, formula=FORMULA, seed=seed, mass=c[1]) for n, c in CELLS.items()), xas=CELLS["B"][2], xrd=CELLS["C"][2], xct=CELLS["E"][2],
                               xrd_start=begin("C").replace(tzinfo=ZONE).isoformat(), xct_start=begin("E").isoformat())
    (folder/"campaign.toml").write_bytes(manifest.encode())
    (folder/"truth.json").write_bytes((json.dumps(truth, indent=1) + "\n").encode())
    files = [folder/"campaign.toml", folder/"truth.json", *sorted(p for p in raw.rglob("*") if p.is_file())]
    sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n" for p in files)
    (folder/"checksums.sha256").write_bytes(sums.encode())
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=Path(__file__).parent/"nmc-sample", type=Path)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    print(make_sample(args.folder, args.seed))
