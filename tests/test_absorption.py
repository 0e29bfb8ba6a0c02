"""X-ray absorption: every measured file opens and agrees with the reference values; damaged and misleading files are refused or mended aloud."""
import gzip
import json
from contextlib import ExitStack

import h5py
import numpy as np
import pytest
import xarray as xr

from batt_nb.campaign.absorption import (READER, absorption, combine, edge_position, energy_in_ev, mend_energy, project_records, read_als_stack,
                                         read_athena, read_columns, read_extranormal, read_hdf5, read_spec, read_xdi)
from batt_nb.campaign.reading import read as read_any
from batt_nb.campaign.reading import read_series
from batt_nb.campaign.sources import materialize, resolve
from batt_nb.core import BattError, absolute_time, flags
from conftest import DATA, needs_data, oracle

XAS = DATA/"xas"
LNO = DATA/"campaigns"/"lno-operando-xas"/"raw"/"xas"
STXM = XAS/"fe-l-edge-stxm"
HEADER = STXM/"ALS_Toner"/"71214078_FigS4"/"71214078.hdr"
SPECTRA = sorted([*XAS.glob("standards-xdi/*/*.xdi"), *XAS.glob("athena/*.prj"), *XAS.glob("lcf-example/*.dat"), *STXM.glob("References/*.e"), *STXM.glob("TXM_XANES/ref_*.txt"),
                  *STXM.glob("HXN_XANES/*.nor"), *HEADER.parent.glob("*.[rt]"), *HEADER.parent.glob("*.xsp"), *XAS.glob("txm-nca/*.csv"), HEADER])


def read(path, **hints): return read_any(path, technique="xas", **hints)


# ------------------------------------------------------------------------------------------------------------- measured files
@needs_data
@pytest.mark.parametrize("path", SPECTRA, ids=lambda p: p.name)
def test_every_file_opens(path):
    ds = read(path)
    main = ds["norm" if "norm" in ds else "mu" if "mu" in ds else "itrans"]
    e = ds.energy.values
    assert e.size >= 40 and (np.diff(e) > 0).all() and 600 < e[0] < e[-1] < 13000
    assert ds.energy.units == "eV" and ds.attrs["source"] == path.name and ds.attrs["format"]
    assert bool(main.notnull().any("energy").all()) and ("mu_rule" in ds.attrs or "mu" not in ds)


@needs_data
def test_the_list_of_spectra_is_complete():
    assert len(SPECTRA) == 58 + 4 + 7 + len(list((STXM/"References").iterdir())) + 2 + 1 + 5 + 1 + 1


@needs_data
@pytest.mark.parametrize("path", [STXM/"ALS_Toner"/"Energy.txt", STXM/"HXN_XANES"/"energy_list_corr.txt", STXM/"TXM_XANES"/"Ni_eng_list.txt", HEADER.parent/"mask_file.msk",
                                  *XAS.glob("txm-nca/ScanInfo*.txt"), STXM/"HXN_XANES"/"Readme.txt", STXM/"_LICENSE.txt"], ids=lambda p: p.name)
def test_what_is_no_spectrum_is_refused(path):
    with pytest.raises(BattError, match="no known format"): read(path)
    assert not any(f.sniff(path, path.read_bytes()[:4096]) for f in READER.formats)


@needs_data
def test_a_fit_with_many_columns_needs_a_map():
    path = STXM/"HXN_XANES"/"xanes_fit_plot.csv"
    with pytest.raises(BattError, match="Hematite_NP_y"): read(path)
    ds = read(path, columns={"energy": "Data_x", "mu": "Data_y"})
    assert ds.sizes == {"energy": 73} and float(ds.mu[0]) == 2.300332805


REFERENCES = oracle("xanes")["spectra"] if DATA.is_dir() else []


@needs_data
@pytest.mark.parametrize("want", REFERENCES, ids=lambda w: w["source"].split("/")[-1])
def test_reference_spectra(want):
    path, _, member = want["source"].partition("::")
    prj = path.endswith(".prj")
    names = [a["label"] for a, _ in project_records(DATA/path)] if prj else []
    ds = read(DATA/path, record=names.index(member)) if prj else read(str(DATA/path) + (f"::{member}" if member else ""))
    mu = ds["norm" if "norm" in ds else "mu"]
    assert mu.dims == ("energy",) and mu.size == want["n_points"]
    np.testing.assert_allclose(mu.energy[[0, -1]], want["energy_first_last_eV"], rtol=1e-7)
    np.testing.assert_allclose(mu.energy[want["sample_index"]], want["energy_eV"], rtol=1e-7)
    np.testing.assert_allclose(mu[want["sample_index"]], want["mu"], rtol=1e-6, atol=1e-7)
    if "ln(" in want["mu_rule"]: assert want["mu_rule"].endswith(ds.mu_rule)
    if "element" in ds.attrs: assert f"{ds.element} {ds.edge}" == want["element_edge"]


@needs_data
def test_rules_and_foils_of_the_standards():
    rules = {p.name: read_xdi(p) for p in XAS.glob("standards-xdi/*/*.xdi")}
    assert rules["cu_metal_10K.xdi"].mu_rule == rules["cu_metal_rt.xdi"].mu_rule == "absorption, as the file gives it"
    assert all(ds.mu_rule == "ln(i0/itrans)" for n, ds in rules.items() if not n.startswith("cu_metal"))
    foils = [n for n, ds in rules.items() if "foil" in ds]
    assert foils and all("irefer" in (DATA/next(XAS.glob(f"standards-xdi/*/{n}"))).read_text() and rules[n].foil_rule == "ln(itrans/irefer)" for n in foils)
    assert all(len(ds.start_time) == 19 and ds.element and ds.edge == "K" for ds in rules.values())
    assert float(rules["Hansel2001_goethite_xanes_003.xdi"].exposure) == 225.0


# ------------------------------------------------------------------------------------------------------------------- operando
@pytest.fixture(scope="module")
def lno():
    sources = resolve(["*.tar.xz::*.txt"], LNO)
    with ExitStack() as stack:
        paths = stack.enter_context(materialize(sources))
        return read_series([(p, s.name) for p, s in zip(paths, sources, strict=True)], "xas", {"name_pattern": r"_(?P<sequence>op\d+)_.*_(?P<setting>dq1|close)_"}, stack)


@needs_data
def test_operando_series(lno):
    want = oracle("operando_alignment")["result"]
    assert lno.norm.dims == ("time", "energy") and lno.sizes == {"time": want["n_spectra"], "energy": want["n_energies"]}
    assert lno.energy.values[[0, -1]].tolist() == want["energy_first_last_eV"]
    stamps = absolute_time(lno)
    assert (np.diff(lno.time) > 0).all()
    for stamp, text in ((stamps[0], want["first_start"]), (stamps[-1], want["last_start"])): assert abs(stamp - np.datetime64(text)) < np.timedelta64(1, "us")
    for name, s in want["sequences"].items():
        part = lno.isel(time=lno.sequence.values == name)
        assert part.sizes["time"] == s["n"] and abs(absolute_time(lno)[lno.sequence.values == name][0] - np.datetime64(s["first_start"])) < np.timedelta64(1, "us")
        assert abs(np.median(np.diff(part.time)) - s["median_period_s"]) < 1e-3
        assert set(part.setting.values) == {"dq1" if name in ("op2", "op3") else "close"}


@needs_data
def test_operando_edges(lno):
    want = oracle("operando_alignment")["result"]
    edge = edge_position(lno.norm, 0.5, (8330, 8360))
    for s in want["samples"]:
        i = s["index_in_time_order"]
        assert str(lno.source.values[i]) == s["file"] and abs(float(edge[i]) - s["edge_eV_at_mu_0.5"]) < 1e-4
        assert abs(float(lno.exposure[i]) - 2*s["time_from_start_s"]) < 1e-5
        white = lno.norm[i].sel(energy=slice(8330, 8380))
        assert float(white.energy[int(np.argmax(white.values))]) == s["white_line_grid_eV"] and abs(float(white.max()) - s["white_line_mu"]) < 1e-6
    np.testing.assert_allclose([edge.min(), edge.max(), edge.mean()], want["edge_min_max_mean_eV"], atol=1e-4)
    assert bool((edge.edge_sigma > 0).all()) and float(edge.edge_sigma.max()) < 0.01


@needs_data
def test_operando_header(lno):
    assert (lno.normalized, lno.foil_aligned) == (1, 1)
    assert (round(float(lno.eshift.min()), 2), round(float(lno.eshift.max()), 2)) == (-0.60, 0.18)
    assert set(lno.header_e0.values) == {8332.88} and set(lno.header_e0_pivot.values) == {8349.6}
    assert len(flags(lno)) == 2 and any("1 gap is longer" in f for f in flags(lno))
    assert {"foil", "foil_derivative", "i0"} <= set(lno.data_vars) and "record" not in lno.coords


@needs_data
def test_single_archives_keep_their_own_start():
    want = oracle("operando_alignment")["result"]["sequences"]["op6"]
    ds = read(LNO/"XAS_normalized_op6_cell4_pos1.tar.xz")
    assert ds.attrs["technique"] == "xas" and ds.sizes["time"] == want["n"] and ds.start_time.startswith(want["first_start"].replace(" ", "T"))


# --------------------------------------------------------------------------------------------------------- Athena and stacks
@needs_data
def test_athena_keeps_every_record():
    path = XAS/"athena"/"NiO.prj"
    ds, raw = read_athena(path), project_records(path)
    labels = [str(r) for r in ds.record.values]
    assert len(labels) == 24 and len(set(labels)) == 22 and int((ds.channel == "reference").sum()) == sum(a["label"].startswith("  Ref") for a, _ in raw) > 10
    assert float(ds.eshift[0]) == 1.252 and any("not applied" in f for f in flags(ds))
    for i, (args, arrays) in enumerate(raw):
        one = ds.mu.isel(frame=i).dropna("energy")
        np.testing.assert_array_equal(one.energy, arrays["x"]); np.testing.assert_array_equal(one, arrays["y"])
        assert float(ds.eshift[i]) == float(args["bkg_eshift"])
    assert set(read_athena(XAS/"athena"/"cyanobacteria.prj").channel.values) == {"sample"}
    common = read_athena(path, grid="common")
    assert bool(common.mu.notnull().all()) and any("interpolated" in f for f in flags(common))


@needs_data
def test_athena_shift_brings_the_foils_together():
    ds = read_athena(XAS/"athena"/"NiO.prj")
    foil = [(one.energy.values, one.values, float(one.eshift)) for i in range(ds.sizes["frame"]) if str((one := ds.mu.isel(frame=i).dropna("energy")).channel.values) == "reference"]
    half = lambda e, y: float(edge_position(xr.DataArray((y - y[e < e[0] + 150].mean())/0.83, dims="energy", coords={"energy": e}), 0.3))
    raw, shifted = np.array([half(e, y) for e, y, _ in foil]), np.array([half(e + s, y) for e, y, s in foil])
    assert np.ptp(raw) > 4 and np.ptp(shifted) < 0.3


@needs_data
def test_stxm_stack():
    ds = read(HEADER, i0="i0.xsp")
    assert dict(ds.sizes) == {"energy": 123, "y": 125, "x": 125} and ds.mu.dims == ("energy", "y", "x")
    assert (float(ds.energy[0]), ds.pixel_size_um, ds.start_time) == (700.0, 0.08, "2007-12-14T18:52:00")
    listed = np.loadtxt(STXM/"ALS_Toner"/"Energy.txt")
    np.testing.assert_allclose(ds.energy[:listed.size], listed, atol=1e-3)
    assert float(ds.itrans[0, 0, 0]) == 353.0 and float(ds.itrans[0, 2, 1]) == 354.0  # third row, second column of 71214078_a000.xim
    beam = np.loadtxt(HEADER.parent/"i0.xsp")
    np.testing.assert_allclose(ds.mu[5, 7, 9], np.log(beam[5, 1]/ds.itrans[5, 7, 9]), rtol=1e-9)
    assert float(ds.elapsed[1]) == 26.0 and float(ds.elapsed[-1]) == 47*60 + 9
    counts = read(HEADER)
    assert "mu" not in counts and any("bare beam" in f for f in flags(counts))


@needs_data
def test_stxm_archive_with_half_of_the_images():
    ds = read(HEADER.parent/"Aligned_000-061.tar.gz")
    assert ds.sizes["energy"] == 62 and any("61 of 123 images are missing" in f for f in flags(ds))
    with pytest.raises(BattError, match="no known format"): read(HEADER.parent/"Aligned_062-122.tar.gz")


# ------------------------------------------------------------------------------------------------------------------ bad input
def write(folder, name, text, encoding="utf-8"):
    (folder/name).write_text(text, encoding=encoding)
    return folder/name


XDI = "# XDI/1.0\n# Column.1: energy {unit}\n# Column.2: i0\n# Column.3: itrans\n# Element.symbol: Ni\n# Element.edge: K\n# Scan.start_time: 2024-01-01T10:00:00\n#---\n"


def xdi(folder, rows, unit="eV", name="a.xdi"):
    return write(folder, name, XDI.format(unit=unit) + "".join(" ".join(map(str, r)) + "\n" for r in rows))


def test_unsorted_energies(tmp_path):
    ds = read(xdi(tmp_path, [(8300, 100, 50), (8302, 100, 30), (8301, 100, 40), (8303, 100, 20)]))
    np.testing.assert_allclose(ds.mu, np.log([2, 2.5, 100/30, 5]))
    assert flags(ds) == ["1 of 3 energy steps run backward: the points were sorted"]


def test_downward_scan_is_turned_round(tmp_path):
    ds = read(xdi(tmp_path, [(8303, 100, 20), (8302, 100, 30), (8301, 100, 40)]))
    np.testing.assert_allclose(ds.mu, np.log([2.5, 100/30, 5]))
    assert flags(ds) == ["the energies run downward: turned round"]


def test_repeated_energies_are_averaged(tmp_path):
    ds = read(xdi(tmp_path, [(8300, 100, 50), (8301, 100, 40), (8301.0002, 100, 20), (8302, 100, 25), (8303, 100, 25)]))
    assert ds.sizes["energy"] == 4 and "1 of 5 readings repeat an energy" in flags(ds)[0]
    np.testing.assert_allclose(ds.mu[1], (np.log(2.5) + np.log(5))/2)
    assert ds.mu.units == "1" and ds.element == "Ni"


def test_a_fine_grid_is_no_repeat():
    e = 8300 + np.arange(100)*4e-4
    ds = mend_energy(xr.Dataset({"mu": ("energy", np.arange(100.))}, {"energy": e}))
    assert ds.sizes["energy"] == 100 and not flags(ds)


def test_missing_rows_are_dropped(tmp_path):
    ds = read(xdi(tmp_path, [(8300, 100, 50), ("nan", 100, 40), (8302, "NaN", 25), (8303, 100, 0), (8304, 100, 25), (8305, 100, 20)]))
    assert ds.energy.values.tolist() == [8300, 8304, 8305] and "3 of 6 points" in flags(ds)[0]
    with pytest.raises(BattError, match="only 0 energies"): read(xdi(tmp_path, [(8300, 100, 0)]*5))


def test_cut_files(tmp_path):
    with pytest.raises(BattError, match="file is empty"): read(write(tmp_path, "empty.xdi", ""))
    with pytest.raises(BattError, match="line 11 has 2 columns"): read(xdi(tmp_path, [(8300, 100, 50), (8301, 100, 40), (8302, 100)]))
    with pytest.raises(BattError, match="no rows of numbers"): read(xdi(tmp_path, []))
    with pytest.raises(BattError, match="words among the numbers"): read(xdi(tmp_path, [(8300, 100, 50), ("ABORTED", "by", "user"), (8301, 100, 40)]))


@needs_data
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_cut_project(tmp_path, keep):
    raw = (XAS/"athena"/"NiO.prj").read_bytes()
    (tmp_path/"cut.prj").write_bytes(raw[:int(len(raw)*keep)])
    with pytest.raises(BattError, match="cut or damaged") as e: read(tmp_path/"cut.prj")
    assert e.value.file == "cut.prj" and e.value.mend


def test_project_is_never_executed(tmp_path):
    evil = "# Athena project file -- Demeter version 0.9\n@args = ('label', __import__('os').system('touch pwned'));\n@x = ('1');\n@y = ('1');\n"
    (tmp_path/"evil.prj").write_bytes(gzip.compress(evil.encode()))
    with pytest.raises(BattError): read(tmp_path/"evil.prj")
    for text, what in (("@x = ('8300','abc','8302');", "words among its numbers"), ("@x = ('8300','8301');", "not as many absorptions")):
        (tmp_path/"bad.prj").write_text(f"# Athena project file -- x\n@args = ('label','a');\n{text}\n@y = ('0','1','2');\n")
        with pytest.raises(BattError, match=what): read(tmp_path/"bad.prj")


def test_wrong_ending_does_not_matter(tmp_path):
    path = xdi(tmp_path, [(8300, 100, 50), (8301, 100, 40), (8302, 100, 25)], name="spectrum.prj")
    assert read(path).attrs["format"] == "XDI"


@pytest.mark.parametrize("e, unit, first", [([8.3, 8.31, 8.32], "", 8300), ([8300, 8301, 8302], "", 8300), ([55, 56, 57], "eV", 55), ([0.7, .71, .72], "keV", 700)])
def test_units(e, unit, first): assert energy_in_ev(np.array(e), unit)[0][0] == pytest.approx(first)


@pytest.mark.parametrize("e, unit", [([55., 60, 65], ""), ([2., 6, 12], ""), ([-20., 0, 80], ""), ([0., 10, 20], ""), ([1.5, 1.6, 1.7], "nm"), ([1.7e9, 1.71e9], ""), ([300., 400], "keV"), ([np.nan]*3, "")])
def test_unclear_units_are_refused(e, unit):
    with pytest.raises(BattError) as error: energy_in_ev(np.array(e), unit)
    assert error.value.mend


def test_unit_from_the_hint(tmp_path):
    path = xdi(tmp_path, [(60, 100, 50), (61, 100, 40), (62, 100, 25)], unit="")
    with pytest.raises(BattError, match="no unit of energy"): read(path)
    assert read(path, units="eV").energy.values[0] == 60 and read(path, units="keV").energy.values[0] == 60000


def test_fluorescence_when_asked():
    c = {"i0": np.array([100., 100]), "itrans": np.array([50., 25]), "ifluor": np.array([1., 2])}
    assert absorption(c)[1]["mu_rule"] == "ln(i0/itrans)" and absorption(c, "fluorescence")[0]["mu"].tolist() == [0.01, 0.02]
    with pytest.raises(BattError, match="no mode"): absorption(c, "guess")


def test_names_stay_text(tmp_path):
    name = """<script>alert('1')</script> "été" & Co.xdi""".replace("/", "_")
    path = xdi(tmp_path, [(8300, 100, 50), (8301, 100, 40), (8302, 100, 25)], name=name)
    path.write_text("# XDI/1.0\n# Sample.name: <b>L'été</b> \"x\"\n" + path.read_text().split("\n", 1)[1])
    ds = combine([read(path)])
    assert ds.source.values.tolist() == [name] and ds.attrs["sample"] == "<b>L'été</b> \"x\"" and json.loads(read_xdi(path).header)["sample.name"] == ds.attrs["sample"]


def test_western_encoding(tmp_path):
    path = write(tmp_path, "old.dat", "# été, température 25 °C\n# energy xmu\n8300 0.1\n8301 0.2\n8302 0.3\n", "latin-1")
    assert "température 25 °C" in read(path).header


def test_header_without_images(tmp_path):
    source = read_header()
    write(tmp_path, "a.hdr", source)
    with pytest.raises(BattError, match="no images"): read(tmp_path/"a.hdr")
    for k in range(2): write(tmp_path, f"a_a00{k}.xim", "100\t90\t\n80\t70\t\n" if k else "100\t90\t\n80\t\n")
    with pytest.raises(BattError, match="cannot be read as rows"): read(tmp_path/"a.hdr")
    write(tmp_path, "a_a000.xim", "100\t90\t\n80\t0\t\n"); write(tmp_path, "a_a002.xim", "100\t90\t\n80\t70\t\n")
    write(tmp_path, "beam.txt", "699 200\n712 200\n")
    ds = read(tmp_path/"a.hdr", i0="beam.txt")
    assert np.isnan(ds.mu.values[0, 1, 1]) and ds.mu.values[1, 0, 0] == pytest.approx(np.log(2)) and "1 pixel values without counts" in flags(ds)[0]
    with pytest.raises(BattError, match="no file"): read(tmp_path/"a.hdr", i0="../beam.txt")
    write(tmp_path, "beam.txt", "699 200\n705 200\n")
    with pytest.raises(BattError, match="measured from 699 to 705"): read(tmp_path/"a.hdr", i0="beam.txt")


def read_header():
    axis = lambda k, u, v: f'\t{k} = {{ Name = "n"; Unit = "{u}"; Min = 0; Max = 1; Dir = 1;\n\t\tPoints = ({len(v)}, {", ".join(map(str, v))});\n}};\n'
    return 'ScanDefinition = { Label = "a.hdr"; Flags = "Image Stack";\n' + axis("PAxis", "um", [0, .1]) + axis("QAxis", "um", [0, .1]) + axis("StackAxis", "eV", [700, 705, 710]) + "};\n"


def test_large_stack_stays_on_disk(tmp_path):
    e, n = 7100. + np.arange(12), 400
    with h5py.File(tmp_path/"big.h5", "w") as f:
        f["axis"], f["data"] = e, np.arange(12*n*n*5, dtype="f8").reshape(12, n*5, n)
    ds = read(tmp_path/"big.h5", paths={"energy": "axis", "mu": "data"})
    assert hasattr(ds.mu.data, "dask") and dict(zip(ds.mu.dims, ds.mu.data.chunks))["energy"] == (2,)*6
    np.testing.assert_array_equal(ds.mu.isel(energy=3, y=2).values, 3*n*n*5 + 2*n + np.arange(n))
    with pytest.raises(BattError, match="no group of the file names"): read(tmp_path/"big.h5")


def test_damaged_hdf5(tmp_path):
    with h5py.File(tmp_path/"a.h5", "w") as f: f["entry/energy"], f["entry/mu"] = 7100. + np.arange(5), np.arange(5.)
    assert read(tmp_path/"a.h5").mu.values.tolist() == [0, 1, 2, 3, 4]
    (tmp_path/"cut.h5").write_bytes((tmp_path/"a.h5").read_bytes()[:900])
    with pytest.raises(BattError, match="cannot be opened"): read(tmp_path/"cut.h5")
    with h5py.File(tmp_path/"b.h5", "w") as f: f["e"], f["m"] = 7100. + np.arange(5), np.zeros((5, 5))
    with pytest.raises(BattError, match="axis 0 or 1"): read_hdf5(tmp_path/"b.h5", paths={"energy": "e", "mu": "m"})


def test_spec_without_spectra(tmp_path):
    path = write(tmp_path, "a.spec", "#F a\n#D Wed Sep 19 20:00:00 2012\n\n#S 1 ascan x\n#N 2\n#L x  det\n1 2\n2 3\n")
    with pytest.raises(BattError, match="no scan holds a spectrum"): read_spec(path)
    (tmp_path/"b.dat").write_text(path.read_text().replace("#L x  det", "#L Energy  mu").replace("1 2\n2 3", "8300 1\n8301 2\n8302 3"))
    assert read(tmp_path/"b.dat").attrs["format"] == "SPEC" and read(tmp_path/"b.dat").mu.values.tolist() == [1, 2, 3]


def test_unknown_columns_are_not_guessed(tmp_path):
    path = write(tmp_path, "a.xdi", "# XDI/1.0\n# Column.1: energy eV\n# Column.2: mcs1\n# Column.3: mcs2\n#--\n8300 1 2\n8301 2 3\n8302 3 4\n")
    with pytest.raises(BattError, match="no absorption can be formed"): read(path)
    assert read(path, columns={"energy": "energy", "i0": "mcs1", "ifluor": "mcs2"}).mu.values.tolist() == [2, 1.5, pytest.approx(4/3)]
    with pytest.raises(BattError, match="there is no role 'mcs'"): read(path, columns={"mcs": 2})


def test_sniffing_reads_only_the_beginning(tmp_path):
    path = write(tmp_path, "long.csv", "time/s,Ewe/V\n" + "".join(f"{1.7e9 + k},3.7\n" for k in range(20000)))
    assert not any(f.sniff(path, path.read_bytes()[:4096]) for f in READER.formats)
    path = write(tmp_path, "fine.dat", "# energy mu\n" + "".join(f"{8300 + k/100:.2f} 0.{k:06d}\n" for k in range(20000)))
    assert read(path).sizes["energy"] == 20000


def test_stack_becomes_a_series(tmp_path):
    write(tmp_path, "a.hdr", read_header() + ' Time = "2007 December 14 18:52:00";\n')
    for k in range(3): write(tmp_path, f"a_a00{k}.xim", f"{100 - k}\t90\t\n80\t70\t\n")
    ds = combine([read(tmp_path/"a.hdr")])
    assert ds.itrans.dims == ("time", "energy", "y", "x") and ds.time.values.tolist() == [0] and ds.attrs["format"] == "ALS STXM stack"


# ----------------------------------------------------------------------------------------------------------------- properties
def test_series_of_mixed_kinds_is_refused(tmp_path):
    a = read_columns(write(tmp_path, "a.dat", "# energy norm\n8300 0\n8301 .5\n8302 1\n"))
    b = read_columns(write(tmp_path, "b.dat", "# energy mu\n8300 0\n8301 .5\n8302 1\n"))
    with pytest.raises(BattError, match="1 hold norm, as 'a.dat'; 1 hold mu, as 'b.dat'"): combine([a, b])


def test_zones_are_not_mixed(tmp_path):
    rows = [(8300, 100, 50), (8301, 100, 40), (8302, 100, 25)]
    a, b = (read_xdi(xdi(tmp_path, rows, name=n)) for n in ("a.xdi", "b.xdi"))
    late = b.assign_attrs(start_time="2024-01-01T10:30:00")
    assert combine([late, a]).time.values.tolist() == [0, 1800]
    with pytest.raises(BattError, match="time zone"): combine([a, late.assign_attrs(start_time="2024-01-01T10:30:00+01:00")])
    same = combine([a, b.assign_attrs(source="b")])
    assert any("same start" in f for f in flags(same)) and same.source.values.tolist() == ["a.xdi", "b"]


def test_order_of_reading_does_not_matter(tmp_path):
    rng = np.random.default_rng(3)
    parts = [read_xdi(xdi(tmp_path, [(8300, 100, 50 + k), (8301, 100, 40), (8302, 100, 25)], name=f"f{k}.xdi")).assign_attrs(start_time=f"2024-01-01T{10 + (7*k) % 12:02d}:00:00") for k in range(12)]
    one = combine(parts)
    for _ in range(5): xr.testing.assert_identical(combine([parts[i] for i in rng.permutation(12)]), one)
    assert (np.diff(one.time) > 0).all()


@pytest.mark.parametrize("noise", [0.001, 0.003, 0.01])
def test_edge_uncertainty_is_calibrated(noise):
    e = np.concatenate([np.arange(8100., 8330, 5), np.arange(8330., 8360, .25)])
    y = .5 + np.arctan((e - 8345.3)/3)/np.pi + np.random.default_rng(0).normal(0, noise, (3000, e.size))
    edge = edge_position(xr.DataArray(y, dims=("frame", "energy"), coords={"energy": e}), window=(8330, 8360))
    assert 0.92 < float((abs(edge - 8345.3) < 1.96*edge.edge_sigma).mean()) < 0.97 and abs(float(edge.mean()) - 8345.3) < 0.01


def test_edge_on_dask_and_on_a_map():
    e = 8320. + np.arange(60.)
    e0 = np.array([[8340., 8342], [8344, 8346]])
    cube = xr.DataArray(.5 + np.arctan(e - e0[..., None])/np.pi, dims=("y", "x", "energy"), coords={"energy": e})
    np.testing.assert_allclose(edge_position(cube, window=(8330, 8360)), e0, atol=1e-6)
    xr.testing.assert_allclose(edge_position(cube.chunk(y=1), window=(8330, 8360)).compute(), edge_position(cube, window=(8330, 8360)))


def test_input_is_untouched(tmp_path):
    parts = [read_xdi(xdi(tmp_path, [(8300, 100, 50), (8301, 100, 40), (8302, 100, 25)], name=f"{k}.xdi")) for k in range(2)]
    before = [p.copy(deep=True) for p in parts]
    combine(parts, name_pattern=r"(?P<n>\d)")
    for p, b in zip(parts, before): xr.testing.assert_identical(p, b)


def test_extranormal_without_start(tmp_path):
    text = "# This file has been produced by extranormal (v 1)\n# E0=8332.88   Eshift=0.1\n# shifted energy\tnormalized\treference\tref.derivative\tI0\n" + "".join(f"{8330 + k} {k} {k} 0 100\n" for k in range(4))
    ds = read_extranormal(write(tmp_path, "a.txt", text))
    assert "start_time" not in ds.attrs and "exposure" not in ds.coords and "the header gives no start time" in flags(ds) and float(ds.eshift) == 0.1
    assert combine([ds]).norm.dims == ("frame", "energy")


def test_stack_files_from_a_header_alone(tmp_path):
    write(tmp_path, "a.hdr", read_header())
    for k in range(3): write(tmp_path, f"a_a00{k}.xim", f"{100 - k}\t90\t\n80\t70\t\n")
    ds = read_als_stack(tmp_path/"a.hdr")
    assert ds.itrans.values[:, 0, 0].tolist() == [100, 99, 98] and "start_time" not in ds.attrs
