"""The path from decays to amounts against the twin's truth and a measured decay."""
import numpy as np
import pytest
import xarray as xr

from batt_nb.campaign.resonance import fourier_transform, read_bruker
from batt_nb.campaign.sources import members, unpack
from batt_nb.cleaning.nmr_processing import correct_baseline, integrals, line_position, normalize_to, phase, reference, transform
from batt_nb.core import BattError, history
from batt_nb.twin.nmr import forward, measure
from conftest import DATA, needs_data, oracle


@pytest.fixture(scope="module")
def clean():
    x = np.linspace(.95, .05, 6)
    share = np.zeros((6, 101)); share[:, 5] = 1 - (x - .05)/.9; share[:, 95] = (x - .05)/.9
    share = xr.DataArray(share, {"time": np.arange(6)*1200.0, "lithium_content": np.linspace(0, 1, 101)}, ("time", "lithium_content"))
    return forward(share, "LFP", plated_mAh=xr.DataArray((.95 - x)*1.7, dims="time"))


@pytest.fixture(scope="module")
def measured(clean): return measure(clean, seed=41)


@pytest.fixture(scope="module")
def phased(measured): return phase(transform(measured.signal))


def away(a, b): return np.abs((a - b + 180) % 360 - 180)


def test_transform_is_the_campaigns(clean):
    plain = transform(clean.signal, window="none", zero_fill=4096, halve_first=False)
    assert np.allclose(plain.values, fourier_transform(clean.signal, zero_fill=4096).values)
    half = transform(clean.signal)
    assert np.allclose(2*half.real.mean("shift"), clean.true_amount.sum("component"), rtol=2e-3)


@pytest.mark.parametrize("window", ["exponential", "gaussian"])
def test_windows_widen_a_line_by_what_they_say(window):
    from batt_nb.twin.nmr import Line, Spectrometer, decay
    s = Spectrometer(points=8192)
    line = decay(Line(0.0, lorentzian=200.0) if window == "exponential" else Line(0.0, gaussian=200.0), s)
    fid = xr.DataArray(line, {"acquisition_time": np.arange(8192)/s.sw_Hz}, ("acquisition_time",), attrs=s.attrs)
    def width(L):
        v = transform(fid, window=window, line_broadening_Hz=L, zero_fill=1 << 17).real
        above = v["shift"].values[v.values > v.values.max()/2]
        return np.ptp(above)*s.larmor_MHz
    assert width(300.0) == pytest.approx(500.0 if window == "exponential" else np.hypot(200, 300), rel=0.03)


def test_phase_at_the_lines_on_held_out_seeds(clean):
    u, ratios = 262*116.642/500e3, []
    for seed in (101, 102, 103, 104):
        m = measure(clean, seed=seed)
        p = phase(transform(m.signal))
        assert p.attrs["method"] == "lines" and away(p.phase, m.true_phase).max() < 1.0
        assert away(p.phase + u*p.phase_slope, m.true_phase + u*m.true_phase_slope).max() < 1.5
        assert abs(float((p.phase_slope - m.true_phase_slope)[0])) < 4*float(p.phase_slope_sigma[0])
        ratios.append((away(p.phase, m.true_phase)/p.phase_sigma).values)
    assert np.mean(np.array(ratios) < 2) > 0.8


@pytest.mark.parametrize("turn", [0.0, 90.0, 180.0, -120.0])
def test_sign_is_never_ambiguous(clean, turn):
    for method, within in (("lines", 0.5), ("entropy", 12)):
        p = phase(transform(clean.signal*np.exp(1j*np.radians(turn))), method=method)
        assert away(p.phase, turn).max() < within, method


def test_no_phase_error_is_left_alone(clean):
    p = phase(transform(clean.signal))
    assert away(p.phase, 0).max() < 0.3 and history(p)[-1]["function"] == "cleaning.nmr_processing.phase"


def test_empty_frame_is_masked(clean):
    s = transform(clean.signal)
    s[2] = np.nan
    p = phase(s)
    assert p.attrs["failed"] == 1 and np.isnan(p.phase[2]) and np.isfinite(p.phase).sum() == 5
    assert np.isnan(line_position(p.spectrum, (-15, 15))[0][2])


def test_reference_takes_the_drift_out(measured, phased):
    r = reference(phased.spectrum, near=(-15, 15))
    assert float((r.moved - measured.true_shift_drift).std()) < 0.03
    again, _ = line_position(r.spectrum, (-15, 15))
    assert float(np.abs(again).max()) < 0.03
    moved = reference(phased.spectrum, near=(-15, 15), each=False)
    assert moved.spectrum["shift"].values[0] == pytest.approx(phased.spectrum["shift"].values[0] - float(r.moved.median()))


def test_metal_follows_the_plated_amount_and_the_electrolyte_stays(measured, phased):
    r = reference(phased.spectrum, near=(-15, 15))
    raw = integrals(r.spectrum, ranges={"metal": (215, 310), "electrolyte": (-14, 14)}, phase_sigma=phased.phase_sigma)
    found = normalize_to(raw, standard="electrolyte", amount=40.0).integral
    true = measured.true_amount.sel(component=["lithium foil", "plated lithium"]).sum("component")
    plated = measured.true_amount.sel(component="plated lithium")
    assert np.polyfit(plated, found.sel(range="metal"), 1)[0] == pytest.approx(1, abs=0.06)
    assert np.abs(found.sel(range="metal")/true - 1).max() < 0.04
    electrolyte = raw.integral.sel(range="electrolyte")/measured.true_gain
    assert float(electrolyte.mean()) == pytest.approx(40, rel=0.04) and float(electrolyte.std()) < 0.5


def test_integral_sigma_is_calibrated(clean):
    ratios = []
    for seed in range(6):
        s = transform(measure(clean, strength={"noise": 4.0, **dict.fromkeys(("pulse_rolloff", "field_drift", "phase_error", "baseline_error", "gain_change"), 0.0)}, seed=seed).signal)
        f = integrals(s, ranges={"electrolyte": (-14, 14)})
        quiet = integrals(transform(clean.signal), ranges={"electrolyte": (-14, 14)}).integral
        ratios.append(((f.integral - quiet)/f.integral_sigma).values.ravel())
    assert 0.6 < np.std(ratios) < 1.6


def test_baseline_goes_through_what_is_free(measured, phased):
    f = correct_baseline(phased.spectrum, keep=[(-15, 15)])
    far = f.spectrum.sel(shift=slice(600, 1500))
    assert abs(float(far.mean())) < 0.2*abs(float(phased.spectrum.real.sel(shift=slice(600, 1500)).mean())) + 3
    assert f.spectrum.dims == phased.spectrum.dims and (f.baseline_sigma > 0).all()


@needs_data
def test_measured_lithium_decay(tmp_path):
    unpack(DATA/"nmr/7Li-hahn-echo-bruker.zip", members(DATA/"nmr/7Li-hahn-echo-bruker.zip"), tmp_path)
    ds = read_bruker(tmp_path/"71")
    o = oracle("nmr")["bruker"][0]
    s = transform(ds.signal, window="none", zero_fill=o["spectrum"]["N"], reference="none")
    top = int(np.argmax(np.abs(s.values)))
    assert float(s["shift"][top]) == pytest.approx(o["spectrum"]["ppm_of_max"], abs=1e-3)
    p = phase(transform(ds.signal, zero_fill=16384))
    real = p.spectrum.real
    smooth = np.convolve(real.values, np.ones(41)/41, "same")
    assert float(real["shift"][int(np.argmax(smooth))]) == pytest.approx(o["topspin"]["ppm_of_max"], abs=25) # the line is 171 ppm wide
    assert smooth.min() > -0.2*smooth.max() and float(p.phase_sigma) > 0


def test_bad_input_is_refused(clean, phased):
    s = transform(clean.signal)
    for call, says in ((lambda: transform(clean.signal, window="sine"), "no window"), (lambda: phase(s.real), "real"), (lambda: phase(s, method="best"), "method"), (lambda: phase(s.rename(shift="f")), "not shift"),
                       (lambda: reference(phased.spectrum, near=(-900, -850)), "no line"), (lambda: integrals(s, ranges={"a": (1e5, 1e5 + 1)}), "outside")):
        with pytest.raises(BattError, match=says): call()
