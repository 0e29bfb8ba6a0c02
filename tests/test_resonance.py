"""NMR readers against the reference values and against broken files."""
import json
import shutil

import numpy as np
import pytest
from batt_nb.campaign.resonance import READER, combine_spectra, fill_missing, fourier_transform, read_bruker, read_jcamp, read_profile
from batt_nb.campaign.sources import members, unpack
from batt_nb.core import BattError, absolute_time, flags
from conftest import DATA, needs_data, oracle

ORACLE = lambda: oracle("nmr")
LITHIUM, MRI = DATA/"nmr/7Li-hahn-echo-bruker.zip", DATA/"campaigns/nmc622-operando-nmr/raw/NMC622_Li.zip"


@pytest.fixture
def lithium(tmp_path):
    unpack(LITHIUM, members(LITHIUM), tmp_path)
    return tmp_path/"71"


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    names = [n for n in members(MRI) if "MRI10mm" in n and n.endswith(".txt")]
    return [read_profile(p, field_of_view_mm=4) for p in reversed(unpack(MRI, names, tmp_path_factory.mktemp("mri")))]


def sniffed(path):
    return [f.name for f in READER.formats if f.sniff(path, path.read_bytes()[:4096] if path.is_file() else b"")]


@needs_data
def test_bruker_raw_and_parameters(lithium):
    o, ds = ORACLE()["bruker"][0], read_bruker(lithium)
    assert sniffed(lithium) == ["Bruker folder"]
    assert list(ds.signal.shape) == o["raw_shape"] and ds.signal.dtype == o["raw_dtype"]
    assert np.abs(ds.signal.values).sum() == pytest.approx(o["raw_sum_abs"])
    assert int(np.abs(ds.signal.values).argmax()) == o["raw_max_abs_index"]
    assert ds.signal.attrs["group_delay_points"] == o["GRPDLY"] and ds.attrs["nucleus"] == o["NUC1"] and ds.attrs["scans"] == o["NS"]
    assert ds.signal.attrs["bf1_MHz"] == pytest.approx(o["BF1_MHz"]) and ds.signal.attrs["sr_Hz"] == pytest.approx(o["topspin"]["SR_Hz = (SF-BF1)*1e6"], abs=.1)
    assert float(ds.acquisition_time[1]) == pytest.approx(1/o["SW_h_Hz"])


@needs_data
def test_bruker_date_is_the_end(lithium):
    ds, o = read_bruker(lithium), ORACLE()["bruker"][0]
    end = absolute_time(ds.assign_coords(time=0.0)) + np.timedelta64(round(float(ds.exposure)*1e9), "ns")
    assert abs(end - np.datetime64(o["DATE_unix"], "s")) <= np.timedelta64(1, "s")
    assert ds.attrs["start_time"].startswith("2022-03-01T11:06:35")


@needs_data
def test_topspin_spectrum_axis(lithium):
    o, s = ORACLE()["bruker"][0]["topspin"], read_bruker(lithium).spectrum
    top = int(np.argmax(s.values))
    assert s.size == o["SI"] and s.size - 1 - top == o["max_index"]
    assert float(s["shift"][top]) == pytest.approx(o["ppm_of_max"], abs=1e-4) and float(s.max()) == pytest.approx(o["max_value"])
    above = s["shift"].values[s.values > s.values.max()/2]
    assert np.diff(s["shift"].values).min() > 0 and np.ptp(above[np.abs(above - o["ppm_of_max"]) < 200]) > 0


@needs_data
@pytest.mark.parametrize("reference, key", [("none", "ppm_of_max"), ("file", "ppm_of_max_with_SR")])
def test_fourier_transform_against_oracle(lithium, reference, key):
    o = ORACLE()["bruker"][0]["spectrum"]
    s = fourier_transform(read_bruker(lithium).signal, zero_fill=o["N"], reference=reference)
    modulus = np.abs(s.values)
    top = int(modulus.argmax())
    assert top == o["modulus_max_bin"] and modulus[top] == pytest.approx(o["modulus_max_value"]) and modulus.sum() == pytest.approx(o["sum_modulus"])
    assert float(s["shift"][top]) == pytest.approx(o[key], abs=1e-4)
    half = np.flatnonzero(modulus > modulus[top]/2)
    run = half[np.abs(half - top) <= len(modulus)]
    a, b = max(i for i in range(top) if modulus[i] < modulus[top]/2), min(i for i in range(top, len(modulus)) if modulus[i] < modulus[top]/2)
    cross = lambda i, j: i + (modulus[top]/2 - modulus[i])/(modulus[j] - modulus[i])*(j - i)
    assert run.size and (cross(b - 1, b) - cross(a, a + 1))*1e6/o["N"] == pytest.approx(o["FWHM_Hz"], rel=1e-5)
    assert json.loads(s.attrs["history"])[-1]["function"].endswith("fourier_transform")


@needs_data
def test_bruker_series_by_time(lithium, tmp_path):
    later = tmp_path/"72"
    shutil.copytree(lithium, later)
    audit = (later/"audita.txt").read_text(encoding="utf-8")
    (later/"audita.txt").write_text(audit.replace("11:06:35", "11:26:35").replace("11:08:49", "11:28:49"), encoding="utf-8")
    ds = combine_spectra([read_bruker(later), read_bruker(lithium)])
    assert list(ds.source.values) == ["71", "72"] and ds.time.values == pytest.approx([0, 1200])
    assert ds.signal.dims == ("time", "acquisition_time") and ds.spectrum.dims == ("time", "shift") and ds.exposure.values == pytest.approx([134.167, 134.167], abs=1e-3)
    both = fourier_transform(ds.signal)
    assert both.dims == ("time", "shift") and both.attrs["sr_Hz"] == pytest.approx(ds.signal.attrs["sr_Hz"])


@needs_data
def test_series_of_different_settings_is_refused(lithium):
    one = read_bruker(lithium)
    other = one.assign(signal=one.signal.assign_attrs(o1_Hz=0.0)).assign_attrs(source="72")
    with pytest.raises(BattError, match="o1_Hz changes"): combine_spectra([one, other])


@needs_data
@pytest.mark.parametrize("harm, says", [
    (lambda f: (f/"fid").write_bytes((f/"fid").read_bytes()[:40000]), "cut short"),
    (lambda f: (f/"fid").write_bytes(b""), "cut short"),
    (lambda f: (f/"acqus").write_text("nothing"), "acqus lacks"),
    (lambda f: (f/"pdata/1/1r").write_bytes((f/"pdata/1/1r").read_bytes()[:1000]), "1r"),
    (lambda f: (f/"pdata/1/procs").write_text("##TITLE= x\n##END=\n"), "procs lacks"),
])
def test_broken_bruker(lithium, harm, says):
    harm(lithium)
    with pytest.raises(BattError, match=says): read_bruker(lithium)


@needs_data
def test_no_audit_trail_is_said(lithium):
    (lithium/"audita.txt").unlink()
    ds, o = read_bruker(lithium), ORACLE()["bruker"][0]
    assert any("no audit trail" in f for f in flags(ds))
    assert float(ds.exposure) == pytest.approx(o["NS"]*(o["TD"]/2/o["SW_h_Hz"] + 0.05))


@needs_data
def test_jcamp():
    o, ds = ORACLE()["jcamp"][0], read_jcamp(DATA/ORACLE()["jcamp"][0]["file"])
    s, n = ds.spectrum, ORACLE()["jcamp"][0]["shape"][0]
    assert s.size == n and float(s.sum()) == pytest.approx(o["sum"]) and float(s.min()) == o["min"] and s.values[::-1][:5] == pytest.approx(o["first_5"])
    top = int(np.argmax(s.values))
    assert n - 1 - top == o["argmax"] and float(s["shift"][top]) == pytest.approx(o["ppm_of_max_with_shift_reference"], abs=1e-4)
    assert ds.attrs["start_time"] == "2009-01-25T09:16:38+00:00" and sniffed(DATA/o["file"]) == ["JCAMP-DX NMR"]


@needs_data
@pytest.mark.parametrize("change, says", [
    (lambda t: t[:len(t)//2], "cut short"),
    (lambda t: t.replace("##NPOINTS= 32768", "##NPOINTS= 32000"), "32768 of 32000"),
    (lambda t: t.replace("##XUNITS= HZ", "##XUNITS= 1/CM"), "abscissa is in"),
    (lambda t: t.replace("NMR SPECTRUM", "INFRARED SPECTRUM"), "not an NMR spectrum"),
])
def test_broken_jcamp(tmp_path, change, says):
    text = (DATA/"nmr/13c.jdx").read_text(encoding="latin-1")
    assert change(text) != text
    (tmp_path/"a.jdx").write_text(change(text), encoding="latin-1")
    with pytest.raises(BattError, match=says): read_jcamp(tmp_path/"a.jdx")


@needs_data
def test_profiles_against_oracle(profiles):
    o, ds = ORACLE()["operando_mri"], combine_spectra(profiles, frame_time_s=float(ORACLE()["operando_mri"]["script_defaults"]["Enter experiment time of one spectrum / s"]))
    assert list(ds.signal.shape) == [o["n_profiles"], o["points_per_profile"][0]]
    assert [int(ds.experiment[0]), int(ds.experiment[-1])] == o["numbers_first_last"]
    assert [str(ds.source.values[0]), str(ds.source.values[-1])] == [o["first_file"], o["last_file"]]
    v = ds.signal.values
    assert [v.min(), v.max(), v.mean()] == pytest.approx(o["profile_min_max_mean"])
    for p in o["profiles"]:
        row = v[p["index"]]
        assert str(ds.source.values[p["index"]]) == p["file"] and row.sum() == pytest.approx(p["sum"]) and int(row.argmax()) == p["argmax"]
        assert row[[0, 64, 128, 192, 255]] == pytest.approx(p["values_at_0_64_128_192_255"])
    first = o["POL"]["col0_first_last"][0]
    hours = first + ds.time.values/3600
    assert hours[[0, 35, 70]] == pytest.approx(o["alignment"]["time_h_of_profile_0_mid_last"])
    assert int((hours <= o["POL"]["col0_first_last"][1]).sum()) == o["alignment"]["n_profiles_inside_POL_span"]
    assert float(ds.z[1] - ds.z[0]) == pytest.approx(4000/256) and ds.z.attrs["units"] == "µm"


@needs_data
def test_missing_profile_and_export_date(profiles):
    o, ds = ORACLE()["operando_mri"], combine_spectra(profiles)
    assert "time" not in ds.dims and "start_time" not in ds.attrs and ds.signal.dims == ("frame", "z")
    assert any("experiment 6 is missing" in f for f in flags(ds)) and any("inferred" in f for f in flags(ds))
    full = fill_missing(ds)
    gone = full.experiment.values[full.signal.isnull().all("z").values]
    assert gone.tolist() == o["missing_numbers"] and full.sizes["experiment"] == 72


@needs_data
def test_profile_without_hint_is_a_spectrum_in_ppm(tmp_path):
    o = ORACLE()["operando_mri"]
    path = unpack(MRI, [f"NMC622_Li/Data/{o['first_file']}"], tmp_path)[0]
    ds = read_profile(path)
    edges = o["spectral_region_ppm_first_file"]
    assert [float(ds["shift"][-1]), float(ds["shift"][0])] == pytest.approx([edges["LEFT"], edges["RIGHT"]], rel=1e-5)
    assert "give field_of_view_mm" in ds.attrs["flags"] and sniffed(path) == ["TopSpin text"]


PROFILE = "# File created = now\n# Data set = MRI  {n}  1\n# Spectral Region:\n# LEFT = 10 ppm. RIGHT = -10 ppm.\n# SIZE = 4\n"


@pytest.mark.parametrize("body, says", [("1\n2\n3\n", "3 of 4"), ("1\n2\nx\n4\n", "no number"), ("1\n2\nnan\n4\n", "1 points are NaN"), ("", "0 of 4")])
def test_broken_profile(tmp_path, body, says):
    (tmp_path/"a(005).txt").write_text(PROFILE.format(n=5) + body)
    with pytest.raises(BattError, match=says): read_profile(tmp_path/"a(005).txt", field_of_view_mm=4)


@pytest.mark.parametrize("fov", [0, -4, float("nan"), "wide", [4]])
def test_field_of_view_must_be_a_length(tmp_path, fov):
    (tmp_path/"a(005).txt").write_text(PROFILE.format(n=5) + "1\n2\n3\n4\n")
    with pytest.raises(BattError): read_profile(tmp_path/"a(005).txt", field_of_view_mm=fov)


def test_number_in_name_and_header_differ(tmp_path):
    (tmp_path/"a(007).txt").write_text(PROFILE.format(n=5) + "1\n2\n3\n4\n")
    ds = read_profile(tmp_path/"a(007).txt", field_of_view_mm=4)
    assert int(ds.experiment) == 5 and any("the name 7" in f for f in flags(ds))
