"""The twin's NMR: tensors and powders against exact results, amounts, artefacts, and Bruker folders read again."""
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import xarray as xr
from batt_nb.campaign import read
from batt_nb.campaign.resonance import fourier_transform, remove_digital_filter
from batt_nb.core import BattError, absolute_time
from batt_nb.twin.nmr import (ARTEFACTS, Foil, Line, Spectrometer, contact_shift, decay, electrode_decays, forward, graphite_lines, lfp_lines, measure, metal_shift, metals,
                              nmc_lines, powder, sidebands, skin_depth, write_bruker)

START = datetime(2026, 3, 23, 17, 15, 0, 250000, tzinfo=timezone(timedelta(hours=1)))
GRID = np.linspace(0, 1, 51)


def shares(*contents):
    """A narrow share about each mean content, of two neighbors on the grid."""
    out = np.zeros((len(contents), GRID.size))
    for k, x in enumerate(contents):
        i = min(int(x*50), 49)
        out[k, i], out[k, i + 1] = i + 1 - x*50, x*50 - i
    return xr.DataArray(out, {"time": 300.0*np.arange(len(contents)), "lithium_content": GRID}, ("time", "lithium_content"))


@pytest.fixture(scope="module")
def series():
    return forward(shares(0.9, 0.6, 0.3), "LFP", plated_mAh=0.5)


def spectrum(signal):
    s = signal.copy(); s[..., 0] /= 2
    return 2*fourier_transform(s, zero_fill=8192).real*float(s.attrs["bf1_MHz"])/s.attrs["sw_Hz"]


@pytest.mark.parametrize("values", [(-30e3, -70e3, 100e3), (-50e3, -50e3, 100e3), (0.0, -80e3, 80e3)])
@pytest.mark.parametrize("rate", [12e3, 30e3, 90e3])
def test_spinning_keeps_the_first_two_moments(values, rate):
    order, intensity = sidebands(values, rate)
    assert intensity.sum() == pytest.approx(1, abs=1e-12) and (intensity >= 0).all()
    assert (intensity*order).sum() == pytest.approx(0, abs=1e-6)
    assert (intensity*(order*rate)**2).sum() == pytest.approx(2/15*np.square(values).sum(), rel=1e-6)


def test_slow_spinning_has_the_static_envelope():
    values, t = (-30e3, -70e3, 100e3), np.arange(0, 2.0e-5, 5e-7)
    assert np.abs(powder(values, t, 200.0) - powder(values, t)).max() < 2e-2 # nothing turns within 20 µs


def test_static_axial_powder_is_the_textbook_pattern():
    """Grains below a frequency f are those with cos(theta) below a square root: the pattern summed up to f must be that."""
    d = 60e3
    t = np.arange(6000)/1e6
    s = powder((-d/2, -d/2, d), t)*np.exp(-np.pi*300*t); s[0] /= 2
    shown = 2*np.fft.fftshift(np.fft.fft(s)).real/1e6
    f = np.fft.fftshift(np.fft.fftfreq(t.size, 1e-6))
    below = lambda edge: np.sqrt((edge + d/2)/(1.5*d)) # share of grains with a frequency below the edge
    for edge in (-15e3, 0.0, 30e3):
        assert shown[f < edge].sum()*(f[1] - f[0]) == pytest.approx(below(edge), abs=0.01)


def test_powder_average_converges():
    t = np.linspace(0, 2e-4, 12)
    n, v = 200, (-55e3, -88e3, 143e3)
    c, phi = (np.arange(1500) + .5)/1500, np.pi*(np.arange(n) + .5)/n
    f = v[2]*c[:, None]**2 + (1 - c[:, None]**2)*(v[0]*np.cos(phi)**2 + v[1]*np.sin(phi)**2)
    direct = np.array([np.exp(2j*np.pi*f*ti).mean() for ti in t])
    assert np.abs(powder(v, t) - direct).max() < 2e-4


def test_lfp_integral_is_linear_and_fepo4_silent():
    x = np.array([0.0, 0.2, 0.5, 0.77, 1.0])
    signal = forward(shares(*x), "LFP", active_mass_mg=7.0, electrolyte_umol=0, foil=None).signal
    expected = 7e3/157.756*x
    assert signal[:, 0].values.real == pytest.approx(expected, rel=1e-6)
    assert float(np.abs(signal[0]).max()) == 0.0
    shown = spectrum(signal)
    assert (shown.sum("shift")*float(np.diff(shown["shift"])[0])).values == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert lfp_lines(1.0)[0][1].shift == pytest.approx(-8, abs=1e-9) # Tucker et al. 2002; the electrode's own field vanishes at the magic angle
    assert lfp_lines(1.0, Spectrometer(tilt_deg=0.0))[0][1].shift < -600


@pytest.mark.parametrize("name", ["LFP", "NMC811", "graphite"])
def test_sidebands_only_when_spinning_and_same_integral(name):
    made = {rate: spectrum(forward(shares(0.9), name, electrolyte_umol=0, foil=None, spectrometer=Spectrometer(spinning_Hz=rate)).signal)[0] for rate in (0.0, 20e3)}
    total = {k: float(v.where(abs(v["shift"]) < 2100, 0).sum()) for k, v in made.items()}
    assert total[20e3] == pytest.approx(total[0.0], rel=0.01)
    if name == "LFP":
        s = made[20e3]
        tops = np.flatnonzero((s[1:-1] > s[:-2].values) & (s[1:-1] > s[2:].values) & (s[1:-1] > 0.1*s.max())) + 1
        order = (s["shift"][tops].values + 8)*116.642/20e3
        assert len(tops) > 8 and np.abs(order - np.round(order)).max() < 0.02
        still = made[0.0].values
        assert ((still[1:-1] > still[:-2]) & (still[1:-1] > still[2:]) & (still[1:-1] > 0.1*still.max())).sum() == 1


def test_nmc_falls_and_narrows():
    mean = np.array([contact_shift(x)[0] for x in (1.0, 0.7, 0.4, 0.25)])
    assert (np.diff(mean) < 0).all() and 550 < mean[0] < 650 and 150 < mean[-1] < 250
    assert mean[0] == pytest.approx(6*(0.1*-30 + 0.7*-15 + 0.1*250) + 6*(0.1*170 + 0.7*110 + 0.1*-60)) # table of Maerker et al. 2019, summed by hand
    assert metals(1.0)["Ni2"] == pytest.approx(0.1) and metals(0.9)["Ni3"] == pytest.approx(0.8)
    narrow = [abs(decay(nmc_lines(x)[0][1], Spectrometer()))[8] for x in (0.95, 0.35)]
    assert narrow[1] > 1.5*narrow[0] # 16 µs after the pulse the mobile sample still rings


def test_graphite_by_the_lever_rule():
    for x in np.linspace(0.01, 1, 34): assert sum(n for n, _ in graphite_lines(x)) == pytest.approx(x, abs=1e-12)
    at = lambda x: sum(n*line.shift for n, line in graphite_lines(x))/x
    assert at(1.0) == pytest.approx(41.8) and at(0.5) == pytest.approx(45.3) and at(0.1) < 13 # Wang et al. 2001: 43 ppm on average for the dense stages, 3 to 13 below
    assert [line.tensor[2] for n, line in graphite_lines(1.0)] == [0, 22.5e3, -22.5e3]


def test_skin_and_susceptibility_of_lithium():
    assert skin_depth(116.642) == pytest.approx(14.2, abs=0.05)
    assert skin_depth(155.5) == pytest.approx(12.2, abs=0.3) # about 12 µm: Chandrashekar et al. 2012
    assert metal_shift(0) == pytest.approx(244, abs=3) and metal_shift(90) == pytest.approx(271, abs=3) # Trease et al. 2012
    assert metal_shift(30, "moss") == pytest.approx(262)
    thick, thin = Foil(thickness_um=1000).visible_umol(116.642), Foil(thickness_um=0.5).visible_umol(116.642)
    assert thick == pytest.approx(113.1*skin_depth(116.642)*1e-3*0.534e-3/6.94e-6, rel=1e-9) and thin == pytest.approx(113.1*0.5e-3*0.534e-3/6.94e-6, rel=0.02)


def test_amounts_add_up(series):
    assert series.signal[:, 0].values.real == pytest.approx(series.true_amount.sum("component").values, rel=1e-9)
    assert float(series.true_amount.sel(component="plated lithium")[0]) == pytest.approx(0.5*3.6/96485.33212*1e6)
    assert series.signal.attrs["units"] == "µmol" and set(series.dims) == {"time", "acquisition_time", "component"}


def test_leading_dimensions_and_dead_time():
    two = xr.concat([shares(0.9, 0.3), shares(0.8, 0.2)], "cell")
    both = forward(two, "LFP")
    assert both.signal.dims == ("cell", "time", "acquisition_time")
    assert np.allclose(both.signal[1], forward(two[1], "LFP").signal)
    late = forward(shares(0.9), "graphite", spectrometer=Spectrometer(dead_time_s=2e-5)).signal
    assert np.allclose(late[0, :-10], forward(shares(0.9), "graphite").signal[0, 10:])


@pytest.mark.parametrize("name", ARTEFACTS)
def test_artefacts_keep_the_contract(series, name):
    f, before = ARTEFACTS[name], series.copy(deep=True)
    bits = lambda **kw: f(series, **kw)["signal"].values.tobytes()
    assert bits(strength=0.0, seed=5) == series.signal.values.tobytes()
    assert bits(seed=5) == bits(seed=5) and (name == "pulse_rolloff" or bits(seed=5) != bits(seed=6))
    sizes = [float(np.abs(f(series, strength=s, seed=5).signal - series.signal).max()) for s in (1e-7, 0.5, 1.0, 2.0)]
    assert sizes[0] < 1e-5*sizes[2] and sizes[1] < sizes[2] < sizes[3]
    assert any(str(v).startswith("true_") and v != "true_amount" for v in f(series).variables)
    assert f(series.signal, seed=5).values.tobytes() == bits(seed=5) and f(series).signal.dims == series.signal.dims
    xr.testing.assert_identical(series, before)


def test_truths_undo_the_artefacts(series):
    rung = ARTEFACTS["baseline_error"](series, seed=1)
    assert np.allclose(rung.signal - rung.true_baseline, series.signal)
    drift = ARTEFACTS["field_drift"](series, seed=1, strength=20)
    back = drift.signal*np.exp(-2j*np.pi*116.642*drift.true_shift_drift*drift.acquisition_time)
    assert np.allclose(back, series.signal)
    gain = ARTEFACTS["gain_change"](series, seed=1)
    assert np.allclose(gain.signal/gain.true_gain, series.signal)
    assert float(np.std((ARTEFACTS["noise"](series, seed=1).signal - series.signal).values.imag)) == pytest.approx(float(np.abs(series.signal[:, 0]).max())/350, rel=0.03)


def test_bruker_round_trip(series, tmp_path):
    made = measure(series.assign_coords(time=[0.0, 360.5, 900.0]), seed=3)
    paths = write_bruker(tmp_path/"nmr", made, START, 300.0, first=11)
    assert [p.name for p in paths] == ["11", "12", "13"]
    back = read(tmp_path/"nmr", technique="nmr")
    factor = float((paths[0]/"pdata"/"1"/"title").read_text().splitlines()[1].split()[0])
    data, fraction = remove_digital_filter(back.signal)
    n = data.shape[1]
    assert fraction == 0 and np.abs(data/factor - made.signal.values[:, :n]).max() < 0.8/factor # rounding of two parts
    assert np.abs(np.asarray(made.signal)).max()*factor < 2**31
    assert absolute_time(back)[0] == np.datetime64("2026-03-23T16:15:00.250") and back.time.values == pytest.approx([0, 360.5, 900.0])
    assert back.exposure.values == pytest.approx([300.0]*3) and back.attrs["nucleus"] == "7Li"
    assert back.signal.attrs["sr_Hz"] == pytest.approx(0, abs=1e-2) and back.signal.attrs["bf1_MHz"] == pytest.approx(116.642)


def test_reference_and_carrier_survive(tmp_path):
    """The electrolyte stands at 0 ppm whatever carrier and reference the spectrometer had."""
    s = Spectrometer(carrier_ppm=120.0, sr_Hz=6259.14, points=4096)
    write_bruker(tmp_path, forward(shares(0.0), "LFP", foil=None, spectrometer=s), START, 600.0)
    back = read(tmp_path, technique="nmr")
    shown = abs(fourier_transform(back.signal, zero_fill=65536))
    assert float(shown["shift"][int(np.argmax(shown.values))]) == pytest.approx(0, abs=0.1)
    assert back.signal.attrs["sr_Hz"] == pytest.approx(6259.14, abs=1e-2)


def test_bruker_bytes_are_the_same(series, tmp_path):
    for name in ("a", "b"): write_bruker(tmp_path/name, measure(series, seed=3), START, 300.0)
    files = [p.relative_to(tmp_path/"a") for p in (tmp_path/"a").rglob("*") if p.is_file()]
    assert len(files) == 15 and all((tmp_path/"a"/f).read_bytes() == (tmp_path/"b"/f).read_bytes() for f in files)


def test_bad_input_is_refused(series, tmp_path):
    with pytest.raises(BattError, match="not to 1"): forward(shares(0.5)*2, "LFP")
    with pytest.raises(BattError, match="no material"): forward(shares(0.5), "NCA")
    with pytest.raises(BattError, match="lithium_content"): forward(shares(0.5).rename(lithium_content="x"), "LFP")
    with pytest.raises(BattError, match="no foil"): forward(shares(0.5), "LFP", foil=None, plated_mAh=1.0)
    with pytest.raises(BattError, match="negative"): forward(shares(0.5), "LFP", plated_mAh=-1.0)
    with pytest.raises(BattError, match="no artefact"): measure(series, hum={"tone": 50})
    with pytest.raises(BattError, match="no time zone"): write_bruker(tmp_path, series, datetime(2026, 1, 1), 300.0)
    with pytest.raises(BattError, match="do not fit"): write_bruker(tmp_path, series, START, 1.0)
    with pytest.raises(BattError, match="dimensions"): write_bruker(tmp_path, series.signal[0], START, 300.0)
    assert not any(tmp_path.iterdir()) # nothing is written before it is checked


def test_kubo_goes_from_gaussian_to_lorentzian():
    t = np.linspace(0, 3e-5, 40)
    still = Line(0.0, spread=20e3).envelope(t)
    assert still == pytest.approx(np.exp(-(2*np.pi*20e3*t)**2/2), rel=1e-6)
    assert Line(0.0, spread=20e3, rate=1e7).envelope(t)[-1] > 0.9 > still[-1]
    assert not electrode_decays("NMC811", np.array([0.0])).any()
