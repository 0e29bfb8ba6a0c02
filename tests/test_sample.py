"""The sample campaign: same seed, same bytes; the files say what truth.json says."""
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

SAMPLE = ROOT/"data_samples"/"nmc-sample"
sys.path.insert(0, str(ROOT/"data_samples"))
from make_sample import CAPACITY, CELLS, make_sample, open_circuit  # noqa: E402


def listed(folder):
    """File name -> sha256, as checksums.sha256 lists them."""
    return {name: digest for digest, name in (line.split("  ", 1) for line in (folder/"checksums.sha256").read_text().splitlines())}


@pytest.fixture(scope="module")
def truth():
    return json.loads((SAMPLE/"truth.json").read_text())


def test_committed_files_match_their_checksums():
    sums = listed(SAMPLE)
    assert {str(p.relative_to(SAMPLE).as_posix()) for p in (SAMPLE/"raw").rglob("*") if p.is_file()} | {"campaign.toml", "truth.json"} == set(sums)
    for name, digest in sums.items(): assert hashlib.sha256((SAMPLE/name).read_bytes()).hexdigest() == digest, name
    assert sum((SAMPLE/n).stat().st_size for n in sums) < 3e6


def test_same_seed_same_bytes(tmp_path):
    made = make_sample(tmp_path/"a")
    assert listed(made) == listed(SAMPLE)
    for name in listed(SAMPLE): assert (made/name).read_bytes() == (SAMPLE/name).read_bytes(), name
    other = listed(make_sample(tmp_path/"b", seed=12))
    assert set(other) == set(listed(made)) and all(other[n] != d for n, d in listed(made).items() if n.startswith("raw/") and not n.endswith(("acqus", "audita.txt", "procs")))


def test_made_twice_into_one_folder_leaves_nothing_behind(tmp_path):
    make_sample(tmp_path/"a")
    (tmp_path/"a"/"raw"/"xas"/"cell_B_Ni_999.xdi").write_text("left over")
    assert listed(make_sample(tmp_path/"a")) == listed(SAMPLE)
    assert not (tmp_path/"a"/"raw"/"xas"/"cell_B_Ni_999.xdi").exists()


def test_numbers_are_those_of_an_nmc811_half_cell(truth):
    for cell in truth["cells"].values():
        assert 185 < cell["capacity_mAh_g_first_charge"] < 210
        assert abs(cell["active_mass_mg"] - cell["weighed_mass_mg"]) < 0.4
    assert CAPACITY == pytest.approx(275.5, abs=0.1)
    x = np.linspace(0.26, 0.98, 50)
    assert (np.diff(open_circuit(x)) < 0).all() and 3.4 < open_circuit(0.98) < open_circuit(0.26) < 4.35
    assert len({round(c["resistance_mV_per_mA_g"], 2) for c in truth["cells"].values()}) == len(CELLS)


def test_manifest_is_valid_and_names_every_raw_file():
    from batt_nb.campaign.manifest import load_manifest
    from batt_nb.campaign.sources import resolve
    manifest = load_manifest(SAMPLE)
    assert set(manifest.cells) == set("ABCDE")
    found = [p for t in manifest.techniques.values() for s in resolve(list(t.files), SAMPLE) for p in (s.path.rglob("*") if s.path.is_dir() else [s.path])]
    assert {p.resolve() for p in found if p.is_file()} == {p.resolve() for p in (SAMPLE/"raw").rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", CELLS)
def test_cycler_files_read_back_to_the_truth(name, truth):
    from batt_nb.campaign.reading import read
    path = next((SAMPLE/"raw"/"echem").glob(f"cell_{name}*"))
    ds, cell = read(path), truth["cells"][name]
    assert float(ds.time[-1] - ds.time[0]) == pytest.approx(cell["duration_s"], abs=0.1)
    assert float(ds.voltage.max()) == pytest.approx(4.3, abs=0.003) and float(ds.voltage.min()) == pytest.approx(3.0, abs=0.003)
    assert float(ds.current.max()) == pytest.approx(cell["current_mA"]*1e-3, rel=1e-6)
    assert float(ds.capacity.max())*1e3/cell["weighed_mass_mg"]*1e3 == pytest.approx(cell["capacity_mAh_g_first_charge"], rel=1e-3)
    assert ds.attrs["start_time"]


def test_series_read_back_to_the_truth(truth):
    from batt_nb.campaign.manifest import load_manifest
    from batt_nb.campaign.reading import read, set_clock
    manifest = load_manifest(SAMPLE)
    for name, frames in truth["frames"].items():
        ds = set_clock(read(SAMPLE/"raw"/name, technique=name, **manifest.techniques[name].hints), manifest.techniques[name].clock)
        kept = [t for i, t in enumerate(frames["t"], 1) if i not in frames["lost"]]
        assert ds.sizes["time"] == len(kept), name
        np.testing.assert_allclose(ds.time - ds.time[0], np.array(kept) - kept[0], atol=1.0, err_msg=name)


def test_clock_of_the_beamline_is_mended_by_the_manifest(truth):
    from batt_nb.campaign.manifest import load_manifest
    from batt_nb.campaign.reading import read, set_clock
    from batt_nb.core import seconds_on
    manifest, frames = load_manifest(SAMPLE), truth["frames"]["xas"]
    cycler = set_clock(read(SAMPLE/"raw/echem/cell_B.mpt"), manifest.techniques["echem_B"].clock)
    raw = read(SAMPLE/"raw/xas", technique="xas")
    kept = [t for i, t in enumerate(frames["t"], 1) if i not in frames["lost"]]
    np.testing.assert_allclose(seconds_on(cycler, raw) - kept, truth["clock_ahead_s"]["xas"], atol=0.01)
    np.testing.assert_allclose(seconds_on(cycler, set_clock(raw, manifest.techniques["xas"].clock)), kept, atol=0.01)


def test_the_script_runs_as_documented(tmp_path):
    import subprocess
    out = subprocess.run([sys.executable, ROOT/"data_samples"/"make_sample.py", tmp_path/"c", "--seed", "11"], capture_output=True, text=True, check=True).stdout
    assert Path(out.strip()) == tmp_path/"c" and listed(tmp_path/"c") == listed(SAMPLE)
