"""Diffraction files against measured reference values, integration against pyFAI figures, and files as they should not be."""
import json
import shutil
import struct
import zipfile
from datetime import datetime

import h5py
import numpy as np
import pytest

from batt_nb.campaign.diffraction import FORMATS, READER, combine, to_q
from batt_nb.campaign.reading import find_format, read
from batt_nb.core import BattError, flags
from conftest import DATA, needs_data, oracle

XRD = oracle("xrd") if DATA.is_dir() else {"files": {}, "azimuthal_integration": {"cases": []}}
SINGLE = [k for k in XRD["files"] if "::" not in k and not k.endswith(".zip")]
COIN = "campaigns/coincell-operando-xrd/raw/coincell8_LDE2_reduced.zip"


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def check_figures(ds, want):
    x, intensity = ds.two_theta.values, ds.intensity.values
    assert x.size == want["n_points"]
    np.testing.assert_allclose([x[0], x[-1]], [want["x_first"], want["x_last"]], rtol=2e-7)
    np.testing.assert_allclose(np.diff(x).mean(), want["step_mean"], rtol=1e-5)
    assert (np.diff(x) > 0).all() and np.isfinite(intensity).all()
    np.testing.assert_allclose(intensity.sum(), want["intensity_sum"], rtol=1e-7)
    np.testing.assert_allclose([intensity.min(), intensity.max()], [want["intensity_min"], want["intensity_max"]], rtol=1e-7)
    assert int(intensity.argmax()) == want["argmax_index0"]
    np.testing.assert_allclose(x[want["sample_index"]], want["sample_x"], rtol=2e-7)
    np.testing.assert_allclose(intensity[want["sample_index"]], want["sample_intensity"], rtol=1e-7)


@needs_data
@pytest.mark.parametrize("name", SINGLE)
def test_file_agrees_with_the_oracle(name):
    want = XRD["files"][name]
    ds = read(DATA/name, technique="xrd")
    assert ds.intensity.dims == ("two_theta",) and ds.two_theta.units == "deg"
    check_figures(ds, want)
    assert ds.attrs["source"] == name.rsplit("/", 1)[-1]
    if want["wavelength_A"] is None:
        assert "wavelength" not in ds.attrs
        with pytest.raises(BattError, match="wavelength is not known"): to_q(ds)
    else:
        assert ds.wavelength == pytest.approx(want["wavelength_A"], abs=1e-9)
        q = to_q(ds).q.values
        np.testing.assert_allclose(q, 4*np.pi*np.sin(np.radians(ds.two_theta.values/2))/want["wavelength_A"], rtol=1e-9)


@needs_data
@pytest.mark.parametrize("name", [k for k in SINGLE if "start_time" in XRD["files"][k]])
def test_clock_and_tube_agree_with_the_oracle(name):
    want, ds = XRD["files"][name], read(DATA/name, technique="xrd")
    start, end = (datetime.fromisoformat(want[k]) for k in ("start_time", "end_time"))
    assert datetime.fromisoformat(ds.start_time) == start and datetime.fromisoformat(ds.start_time).tzinfo is not None
    assert ds.exposure_s == pytest.approx((end - start).total_seconds())
    assert ds.wavelength_ka2 == pytest.approx(want["kalpha2"])
    if "ratio" in want: assert ds.ka2_ka1_ratio == want["ratio"]
    if "counting_time_s" in want: assert ds.counting_time_s == want["counting_time_s"]
    np.testing.assert_allclose(ds.intensity_sigma.values, np.sqrt(ds.intensity.values))
    assert "counts" in ds.sigma_source


@needs_data
def test_brml_takes_the_measured_time_and_the_raw_its_date():
    assert read(DATA/"xrd/formats/TiOF.brml", technique="xrd").counting_time_s == 124.8
    ds = read(DATA/"xrd/formats/TiO2.raw", technique="xrd")
    assert ds.start_time == "2018-07-11T15:55:31" and "month/day" in flags(ds)[0]
    other = read(DATA/"xrd/formats/TiO2.raw", technique="xrd", day_first=True)
    assert other.start_time == "2018-11-07T15:55:31"


@needs_data
def test_cut_beamline_file_is_flagged_with_both_figures():
    want, ds = XRD["files"]["xrd/formats/example_bmb.xye"], read(DATA/"xrd/formats/example_bmb.xye", technique="xrd")
    told = [f for f in flags(ds) if "truncated" in f]
    assert len(told) == 1 and str(want["header_says_steps"]) in told[0] and str(want["n_points"]) in told[0] and "28.0" in told[0]
    assert ds.header_temperature_K == want["temperature_K"] and ds.start_time == "2017-04-12T01:23:16.472073"
    assert ds.sigma_source == "a column of the file"


@needs_data
def test_theta_column_is_two_theta_unless_said():
    name = DATA/"xrd/formats/example_ocx.xy"
    ds = read(name, technique="xrd")
    assert "is read as 2θ" in flags(ds)[0] and "160" in flags(ds)[0]
    assert read(name, technique="xrd", axis="theta").two_theta.values[-1] == pytest.approx(160)
    assert "intensity_sigma" not in ds


@needs_data
@pytest.mark.parametrize("name", ["example_mac.xye", "example_mythen.xye", "example_mythen.dat", "example_bmb.xye"])
def test_third_column_is_sigma(name):
    ds = read(DATA/"xrd/formats"/name, technique="xrd")
    assert (ds.intensity_sigma > 0).all() and ds.sigma_source == "a column of the file"


@needs_data
def test_eva_export_gets_no_wavelength_from_its_anode():
    ds = read(DATA/"xrd/formats/example_evadiffract.xy", technique="xrd")
    assert ds.anode == "Cu" and "wavelength" not in ds.attrs and ds.header_time_per_step_s == 96


@needs_data
def test_coin_cell_patterns(tmp_path):
    scans = XRD["files"][COIN]["scans"]
    ds = read(f"{DATA/COIN}::*/xrd_data/*.xye", technique="xrd")
    assert ds.intensity.dims == ("frame", "two_theta") and list(ds.source.values) == [s["file"] for s in scans]
    for i, s in enumerate(scans): check_figures(ds.isel(frame=i), s["pattern"])
    assert np.diff(ds.two_theta).max() == pytest.approx(0.012)
    assert "wavelength" not in ds.attrs
    ratio = (ds.intensity_sigma**2/ds.intensity).values
    assert np.median(ratio) == pytest.approx(0.5, abs=1e-3)  # the file's own sigma, which is not sqrt(I)
    with pytest.raises(BattError, match="wavelength"): to_q(ds)
    known = read(f"{DATA/COIN}::*/xrd_data/*.xye", technique="xrd", wavelength=0.8265)
    assert to_q(known).intensity.dims == ("frame", "q") and known.wavelength_source == "hint"


@needs_data
def test_xrdml_scans_become_a_series_in_time():
    names = [f"Scan_C{i}.xrdml" for i in (10, 2, 1)]
    parts = [read(DATA/"xrd/formats"/n, technique="xrd") for n in names]
    ds = combine(parts)
    starts = [datetime.fromisoformat(XRD["files"][f"xrd/formats/{n}"]["start_time"]) for n in names]
    assert list(ds.source.values) == names[::-1]
    np.testing.assert_allclose(ds.time.values, sorted((s - min(starts)).total_seconds() for s in starts))
    assert (ds.exposure > 800).all() and datetime.fromisoformat(ds.start_time) == min(starts)
    assert any("sorted by their start" in f for f in flags(ds))


@needs_data
def test_unlike_grids_are_refused_with_figures_or_interpolated_on_request():
    a, b = (read(DATA/"xrd/formats"/n, technique="xrd") for n in ("Scan_C1.xrdml", "CG20396_jdb12-1.xrdml"))
    with pytest.raises(BattError, match=r"shifted by up to 0\.0036 deg"): combine([a, b])
    ds = combine([a, b], grid="common")
    grid = ds.two_theta.values
    assert grid[0] >= max(a.two_theta[0], b.two_theta[0]) and grid[-1] <= min(a.two_theta[-1], b.two_theta[-1])
    second = ds.sel(time=ds.source == "CG20396_jdb12-1.xrdml").intensity.values[0]
    np.testing.assert_allclose(second, np.interp(grid, b.two_theta, b.intensity), rtol=1e-9)
    assert any("interpolated linearly" in f for f in flags(ds))
    i = 100
    j = int(np.searchsorted(b.two_theta.values, grid[i])) - 1
    w = (grid[i] - b.two_theta.values[j])/(b.two_theta.values[j + 1] - b.two_theta.values[j])
    want = np.hypot((1 - w)*b.intensity_sigma.values[j], w*b.intensity_sigma.values[j + 1])
    assert ds.sel(time=ds.source == "CG20396_jdb12-1.xrdml").intensity_sigma.values[0, i] == pytest.approx(want)


# --- integration of detector frames ---------------------------------------------------------------------------------


def oracle_image(case):
    centre = {"no_rotation": (250.3, 260.7), "rotated": (240.0, 270.0)}[case["name"]]
    i, j = np.mgrid[:512, :512].astype(float)
    r = np.hypot(i - centre[0], j - centre[1])
    image = 1000*np.exp(-((r - 120)/6)**2) + 400*np.exp(-((r - 200)/4)**2) + 10 + 0.05*j
    assert image.sum() == pytest.approx(case["image"]["sum"], rel=1e-7)
    return image


def write_poni(path, g, shape=(512, 512)):
    config = json.dumps({"pixel1": g["pixel_m"], "pixel2": g["pixel_m"], "max_shape": list(shape), "orientation": 3})
    return write(path, f"poni_version: 2.1\nDetector: Detector\nDetector_config: {config}\nDistance: {g['dist_m']}\nPoni1: {g['poni1_m']}\nPoni2: {g['poni2_m']}\n"
                       f"Rot1: {g['rot1_rad']}\nRot2: {g['rot2_rad']}\nRot3: {g['rot3_rad']}\nWavelength: {g['wavelength_m']}\n")


GEOMETRY = dict(dist_m=0.1, poni1_m=0.0128, poni2_m=0.0118, rot1_rad=0, rot2_rad=0, rot3_rad=0, pixel_m=1e-4, wavelength_m=1e-10)


@needs_data
@pytest.mark.parametrize("case", XRD["azimuthal_integration"]["cases"], ids=lambda c: c["name"])
@pytest.mark.parametrize("kind", ["edf", "tif"])
def test_integration_agrees_with_the_oracle(case, kind, tmp_path):
    import fabio
    image = oracle_image(case).astype("float32")
    frame = tmp_path/f"frame.{kind}"
    ({"edf": fabio.edfimage.edfimage, "tif": fabio.tifimage.tifimage}[kind](data=image)).write(str(frame))
    write_poni(tmp_path/"g.poni", case["geometry"])
    call = case["call"]
    for want in case["results"]:
        ds = to_q(read(frame, technique="xrd", poni="g.poni", npt=call["npt"], bins="q", radial_range=call["radial_range"], error_model="none", solid_angle=want["correctSolidAngle"]))
        assert ds.wavelength == pytest.approx(case["geometry"]["wavelength_m"]*1e10)
        where = np.abs(ds.q.values[:, None] - np.array(want["q_A^-1"])).argmin(0)
        np.testing.assert_allclose(ds.q.values[where], want["q_A^-1"], rtol=1e-6)
        np.testing.assert_allclose(ds.intensity.values[where], want["I"], rtol=5e-6)
        # the sum holds the few bins in which single pixels lie on an edge, too
        assert ds.intensity.values.sum() == pytest.approx(want["I_sum"], rel=want["max_rel_diff_over_all_bins"] + 1e-4)
        assert "intensity_sigma" not in ds


def poisson_frames(n, seed=0):
    i, j = np.mgrid[:256, :256] + 0.5
    r = np.hypot(i - 128, j - 118)
    return np.random.default_rng(seed).poisson(60 + 900*np.exp(-((r - 60)/5)**2), (n, 256, 256)).astype("uint32")


def test_frames_in_hdf5_have_honest_sigmas(tmp_path):
    frames = poisson_frames(30)
    write_poni(tmp_path/"g.poni", GEOMETRY, (256, 256))
    with h5py.File(tmp_path/"stack.h5", "w") as f: f["entry/data"] = frames
    ds = read(tmp_path/"stack.h5", technique="xrd", poni="g.poni", paths={"frames": "/entry/data"}, error_model="poisson")
    assert ds.intensity.dims == ("frame", "two_theta") and ds.sizes["frame"] == 30
    pulls = ((ds.intensity - ds.intensity.mean("frame"))/ds.intensity_sigma).values*np.sqrt(30/29)
    assert np.std(pulls) == pytest.approx(1, abs=0.05)
    assert ds.two_theta[int(ds.intensity[0].values.argmax())] == pytest.approx(np.degrees(np.arctan(60*1e-4/0.1)), abs=0.06)


def test_dead_pixels_and_gaps_are_left_out(tmp_path):
    frames = poisson_frames(2)
    clean = frames.copy()
    frames[:, 100:110] = 2**32 - 1
    write_poni(tmp_path/"g.poni", GEOMETRY, (256, 256))
    for name, data in (("gaps", frames), ("clean", clean)):
        with h5py.File(tmp_path/f"{name}.h5", "w") as f: f["d"] = data
    a, b = (read(tmp_path/f"{n}.h5", technique="xrd", poni="g.poni", paths={"frames": "/d"}, npt=100) for n in ("gaps", "clean"))
    assert any("2560 pixels" in f for f in flags(a))
    assert np.abs(((a.intensity - b.intensity)/a.intensity_sigma).values).max() < 4


def test_frame_errors(tmp_path):
    import fabio
    frame = tmp_path/"f.edf"
    fabio.edfimage.edfimage(data=poisson_frames(1)[0].astype("int32")).write(str(frame))
    write_poni(tmp_path/"g.poni", GEOMETRY, (256, 256))
    np.save(tmp_path/"small.npy", np.zeros((10, 10)))
    write_poni(tmp_path/"other.poni", GEOMETRY, (512, 512))
    write(tmp_path/"bad.poni", "nothing here")
    for hints, message in (({}, "needs its geometry"), ({"poni": "no.poni"}, "neither there nor beside"), ({"poni": "other.poni"}, "is for"), ({"poni": "g.poni", "mask": "small.npy"}, "mask has"),
                           ({"poni": "g.poni", "error_model": "guess"}, "error_model"), ({"poni": "g.poni", "wavelength": 2.0}, "the file says 1"), ({"poni": "bad.poni"}, "bad.poni")):
        with pytest.raises(BattError, match=message): read(frame, technique="xrd", **hints)


@pytest.mark.parametrize("kind", ["edf", "tif", "cbf"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_cut_frame_is_refused_and_not_filled_with_zeros(kind, part, tmp_path):
    import fabio
    whole, cut = tmp_path/f"whole.{kind}", tmp_path/f"cut.{kind}"
    {"edf": fabio.edfimage.edfimage, "tif": fabio.tifimage.tifimage, "cbf": fabio.cbfimage.cbfimage}[kind](data=poisson_frames(1)[0].astype("int32")).write(str(whole))
    write_poni(tmp_path/"g.poni", GEOMETRY, (256, 256))
    assert read(whole, technique="xrd", poni="g.poni").intensity.max() > 500
    cut.write_bytes(whole.read_bytes()[:int(whole.stat().st_size*part)])
    with pytest.raises(BattError): read(cut, technique="xrd", poni="g.poni")


# --- other formats --------------------------------------------------------------------------------------------------


def test_chi_and_fxye_and_their_cut_ends(tmp_path):
    x = 5 + 0.02*np.arange(50)
    rows = "".join(f" {a:.4f} {100 + i}\n" for i, a in enumerate(x))
    chi = read(write(tmp_path/"anything.dat", f"frame\n2-Theta Angle (Degrees)\nIntensity\n  60\n{rows}"), technique="xrd")
    assert chi.format == "Fit2D .chi" and any("60 points, the file holds 50" in f for f in flags(chi))
    np.testing.assert_allclose(chi.two_theta, x, atol=1e-4)
    lines = "".join(f"{a*100:.3f} {100 + i} {np.sqrt(100 + i):.5f}\n" for i, a in enumerate(x))
    gsas = read(write(tmp_path/"b.fxye", f"title\nBANK 1 50 50 CONST {x[0]*100} 2.0 0 0 FXYE\n{lines}"), technique="xrd")
    np.testing.assert_allclose(gsas.two_theta, x, atol=1e-5)
    np.testing.assert_allclose(gsas.intensity_sigma**2, gsas.intensity, rtol=1e-4)
    assert not flags(gsas)


def test_q_columns_need_a_wavelength(tmp_path):
    q = np.linspace(1, 5, 40)
    file = write(tmp_path/"a.xy", "# --> a.xy\n#       q_A^-1              I\n" + "".join(f"{a:.6f} 10\n" for a in q))
    with pytest.raises(BattError, match="given in q"): read(file, technique="xrd")
    np.testing.assert_allclose(to_q(read(file, technique="xrd", wavelength=0.5)).q, q, atol=1e-6)


def make_map(path, shape=(3, 4), n=50, **units):
    rng = np.random.default_rng(3)
    with h5py.File(path, "w") as f:
        f["entry/I"] = rng.poisson(100, (*shape, n)).astype("float32")
        f["entry/tth"] = np.linspace(5, 10, n); f["entry/tth"].attrs["units"] = "deg"
        for k, length in zip("yx", shape, strict=True):
            f[f"entry/{k}"] = 0.1*np.arange(length)
            f[f"entry/{k}"].attrs["units"] = "mm"
    return {"intensity": "/entry/I", "two_theta": "/entry/tth", "y": "/entry/y", "x": "/entry/x"}


def test_map_in_hdf5(tmp_path):
    paths = make_map(tmp_path/"m.h5")
    ds = read(tmp_path/"m.h5", technique="xrd", paths=paths, wavelength=0.5)
    assert ds.intensity.dims == ("y", "x", "two_theta") and ds.y.units == "µm"
    np.testing.assert_allclose(ds.x, [0, 100, 200, 300])
    with h5py.File(tmp_path/"m.h5") as f: np.testing.assert_array_equal(ds.intensity, f["entry/I"])
    both = combine([ds, ds])
    assert both.intensity.dims == ("frame", "y", "x", "two_theta")
    with pytest.raises(BattError, match=r"/entry/I \(3, 4, 50\)"): read(tmp_path/"m.h5", technique="xrd")
    with pytest.raises(BattError, match="no /entry/J"): read(tmp_path/"m.h5", technique="xrd", paths=paths | {"intensity": "/entry/J"})
    with pytest.raises(BattError, match="does not fit"): read(tmp_path/"m.h5", technique="xrd", paths=paths, dims=["two_theta", "y", "x"])


def test_nexus_default_plot_is_found(tmp_path):
    with h5py.File(tmp_path/"n.h5", "w") as f:
        f.attrs["default"] = "entry"
        f["entry/result/I"] = np.arange(20.0); f["entry/result/I_errors"] = np.ones(20); f["entry/result/tth"] = np.linspace(1, 2, 20)
        f["entry"].attrs["default"] = "result"
        f["entry/result"].attrs.update(signal="I", axes=["tth"])
        f["entry/result/tth"].attrs["units"] = "rad"
    ds = read(tmp_path/"n.h5", technique="xrd")
    np.testing.assert_allclose(ds.two_theta, np.degrees(np.linspace(1, 2, 20)))
    np.testing.assert_array_equal(ds.intensity_sigma, 1)


def test_large_maps_stay_in_the_file(tmp_path):
    paths = make_map(tmp_path/"big.h5", (60, 60), 6000)
    ds = read(tmp_path/"big.h5", technique="xrd", paths=paths)
    assert hasattr(ds.intensity.data, "dask") and ds.intensity.chunks[1] == (60,)
    with h5py.File(tmp_path/"big.h5") as f: np.testing.assert_array_equal(ds.intensity[7, 5].values, f["entry/I"][7, 5])


# --- files as they should not be ------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("name", ["TiOF.brml", "Scan_C1.xrdml", "TiO2.raw", "JO_KL_16_ZF_3_60deg_0.02step_12degpermin_001.rasx"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_truncated_files_are_refused(name, part, tmp_path):
    data = (DATA/"xrd/formats"/name).read_bytes()
    cut = tmp_path/name
    cut.write_bytes(data[:int(len(data)*part)])
    with pytest.raises(BattError) as e: read(cut, technique="xrd")
    assert e.value.mend and name in str(e.value)
    assert any(w in e.value.what for w in ("cut", "damaged", "declares", "ends", "goes on"))


@needs_data
@pytest.mark.parametrize("name", ["TiOF.brml", "Scan_C1.xrdml", "TiO2.raw", "example_bmb.xye", "example_ocx.xy"])
def test_the_ending_of_a_name_does_not_matter(name, tmp_path):
    wrong = tmp_path/"a.xyz"
    shutil.copy(DATA/"xrd/formats"/name, wrong)
    np.testing.assert_array_equal(read(wrong, technique="xrd").intensity, read(DATA/"xrd/formats"/name, technique="xrd").intensity)


@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b"no pattern here\n", "no known format"),
    (b"5.0 100\n5.1 abc\n5.2 102\n5.3 103\n", "line 2"),
    (b"5.0 100\n5.1 101\n5.2 abc\n5.3 103\n", "line 3"),
    (b"5.0 100\n5.1 101\n5.1 102\n5.2 103\n", "more than once"),
    (b"5.0 nan\n5.1 nan\n5.2 nan\n", "0 of 3 rows"),
    (b"5.0 100 -1\n5.1 101 1\n", "no known format"),
    (b"two_theta,intensity\n5000,100\n5002,101\n", "outside 0 to 180"),
    (b"two_theta,intensity,sigma\n50,100,-3\n51,101,2\n", "negative"),
])
def test_bad_text_is_refused(content, message, tmp_path):
    (tmp_path/"a.xy").write_bytes(content)
    with pytest.raises(BattError, match=message): read(tmp_path/"a.xy", technique="xrd")


def test_nan_and_unsorted_rows_are_mended_and_said(tmp_path):
    ds = read(write(tmp_path/"a.xy", "5.3 4\n5.2 3\nnan 7\n5.1 nan\n5.0 1\n"), technique="xrd")
    assert list(ds.two_theta.values) == [5.0, 5.2, 5.3] and list(ds.intensity.values) == [1, 3, 4]
    assert any("2 of 5 rows" in f for f in flags(ds)) and any("rising order" in f for f in flags(ds))


def test_centidegrees_and_counts_by_hint(tmp_path):
    file = write(tmp_path/"a.xy", "two_theta,intensity\n5000,100\n5002,121\n")
    ds = read(file, technique="xrd", axis="centidegrees", counts=True)
    np.testing.assert_allclose(ds.two_theta, [50, 50.02]); np.testing.assert_allclose(ds.intensity_sigma, [10, 11])
    with pytest.raises(BattError, match="unknown hint 'wavelenght'"): read(file, technique="xrd", wavelenght=1.5)
    with pytest.raises(BattError, match="cannot be meant"): read(file, technique="xrd", axis="centidegrees", wavelength=1.5e-10)


def test_decimal_comma_and_latin1(tmp_path):
    (tmp_path/"a.xy").write_bytes("# Probe: Größe 5 µm\n5,00;12,5\n5,02;13,0\n5,04;13,5\n".encode("latin-1"))
    np.testing.assert_allclose(read(tmp_path/"a.xy", technique="xrd").intensity, [12.5, 13, 13.5])


def test_zip_inside_formats_are_not_unpacked_as_archives(tmp_path):
    with zipfile.ZipFile(tmp_path/"empty.brml", "w") as z: z.writestr("Experiment0/DataContainer.xml", "<a/>")
    with pytest.raises(BattError, match="no RawData"): read(tmp_path/"empty.brml", technique="xrd")


def test_raw_of_two_ranges_becomes_a_series(tmp_path):
    body = b""
    for counts in ([100, 400, 900], [4, 9, 16]):
        body += struct.pack("<I28s24s16sddI20sd16sII16s", 0, b"", b"Locked Coupled", b"", 10.0, 0.5, 3, b"", 1.5406, b"", 4, 0, b"") + np.array(counts, "<f4").tobytes()
    (tmp_path/"a.raw").write_bytes(b"RAW4.00\0\xef\xff\0\0" + struct.pack("<12s12s25s", b"12/31/2018", b"15:55:31", b"") + body)
    ds = read(tmp_path/"a.raw", technique="xrd")
    assert ds.intensity.shape == (2, 3) and any("2 scans in one file" in f for f in flags(ds))
    assert list(read(tmp_path/"a.raw", technique="xrd", scan=1).intensity.values) == [4, 9, 16]
    with pytest.raises(BattError, match="holds 2"): read(tmp_path/"a.raw", technique="xrd", scan=2)


def test_every_hint_is_taken_by_some_format():
    import inspect

    from batt_nb.campaign import diffraction
    source = inspect.getsource(diffraction)
    body = source[:source.index("READER = Reader(")]
    assert [h for h in READER.hints if f'"{h}"' not in body and f"{h}=" not in body and f"{h}:" not in body] == []


def test_formats_are_found_by_content_only(tmp_path):
    file = write(tmp_path/"a.unknown", "5.0 100\n5.1 101\n5.2 102\n")
    technique, fmt = find_format(file, "xrd")
    assert technique == "xrd" and fmt.generic and len({f.name for f in FORMATS}) == len(FORMATS)


XRDML = """<?xml version="1.0"?><xrdMeasurements xmlns="http://www.xrdml.com/XRDMeasurement/2.1"><xrdMeasurement><usedWavelength intended="K-Alpha"><kAlpha1>1.540598</kAlpha1></usedWavelength>{}</xrdMeasurement></xrdMeasurements>"""
XRDML_SCAN = """<scan status="{status}"><header><startTimeStamp>2024-03-08T{start}</startTimeStamp><endTimeStamp>2024-03-08T{end}</endTimeStamp></header><dataPoints><positions axis="2Theta"><startPosition>10</startPosition>
<endPosition>12</endPosition></positions><commonCountingTime>60</commonCountingTime>{factors}<{tag}>{values}</{tag}></dataPoints></scan>"""


def xrdml(path, *scans, **more):
    fill = {"status": "Completed", "factors": "", "tag": "counts", "values": "100 400 900"} | more
    return write(path, XRDML.format("".join(XRDML_SCAN.format(start=s, end=e, **fill) for s, e in scans)))


def test_files_of_several_scans_join_one_time_axis(tmp_path):
    several = xrdml(tmp_path/"b.xrdml", ("11:10:00-06:00", "11:15:00-06:00"), ("11:20:00-06:00", "11:24:00-06:00"))
    single = xrdml(tmp_path/"a.xrdml", ("18:00:00+01:00", "18:05:00+01:00"))  # 11:00 in the other's zone
    ds = read(tmp_path, technique="xrd")
    assert [s.rsplit("::", 1)[-1] for s in ds.source.values] == ["a.xrdml", "b.xrdml", "b.xrdml"]
    np.testing.assert_allclose(ds.time, [0, 600, 1200]); np.testing.assert_allclose(ds.exposure, [300, 300, 240])
    assert ds.start_time == "2024-03-08T18:00:00+01:00" and several.is_file() and single.is_file()
    assert ds.wavelength == 1.540598 and ds.counting_time_s == 60


@pytest.mark.parametrize("tag, stored", [("counts", "100 100 100"), ("intensities", "100 100 1000")])
def test_attenuation_is_applied_once(tag, stored, tmp_path):
    ds = read(xrdml(tmp_path/"a.xrdml", ("11:10:00Z", "11:15:00Z"), tag=tag, values=stored, factors="<beamAttenuationFactors>1 1 10</beamAttenuationFactors>"), technique="xrd")
    np.testing.assert_allclose(ds.intensity, [100, 100, 1000]); np.testing.assert_allclose(ds.intensity_sigma, [10, 10, 100])
    assert "1 of 3 points (factor up to 10)" in flags(ds)[0]


def test_aborted_scan_and_other_axes(tmp_path):
    ds = read(xrdml(tmp_path/"a.xrdml", ("11:10:00Z", "11:15:00Z"), status="Aborted"), technique="xrd")
    assert "status is Aborted" in flags(ds)[0]
    text = (tmp_path/"a.xrdml").read_text().replace('axis="2Theta"', 'axis="Omega"')
    with pytest.raises(BattError, match="no 2Theta axis, only Omega"): read(write(tmp_path/"b.xrdml", text), technique="xrd")
    text = (tmp_path/"a.xrdml").read_text().replace("400", "4o0")
    with pytest.raises(BattError, match="cannot be read"): read(write(tmp_path/"c.xrdml", text), technique="xrd")


def test_frames_of_one_file_have_no_times(tmp_path):
    write_poni(tmp_path/"g.poni", GEOMETRY, (256, 256))
    with h5py.File(tmp_path/"s.h5", "w") as f: f["d"] = poisson_frames(3)
    ds = read(tmp_path/"s.h5", technique="xrd", poni="g.poni", paths={"frames": "/d"})
    assert list(ds.frame.values) == [0, 1, 2] and "time" not in ds.coords
    both = combine([ds.assign_attrs(source="a"), ds.assign_attrs(source="b")])
    assert list(both.source.values) == ["a"]*3 + ["b"]*3 and "scatter around the ring" in both.sigma_source


def test_missing_sigmas_are_nan_not_invented(tmp_path):
    a = read(write(tmp_path/"a.xy", "5.0 100\n5.1 101\n"), technique="xrd")
    b = read(write(tmp_path/"b.xye", "5.0 100 3\n5.1 101 4\n"), technique="xrd")
    ds = combine([a, b])
    assert np.isnan(ds.intensity_sigma[0]).all() and list(ds.intensity_sigma[1].values) == [3, 4]
    with pytest.raises(BattError, match="1 of 2 patterns do not say their wavelength"): combine([a.assign_attrs(wavelength=0.5), b])
