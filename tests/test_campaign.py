"""A campaign from raw files to the joined frames, and what happens when its files are not as they should be."""
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from batt_nb.campaign import Campaign, draft_manifest, read
from batt_nb.campaign.manifest import load_manifest
from batt_nb.core import BattError, flags, history

STRANGE = "scan <img src=x onerror=alert(1)> 'é' \"q\" {}.xdi"
MANIFEST = """
[campaign]
name = "Tiny <script>alert(1)</script> é"
[cells."Zelle <b>1</b>"]
electrode_material = "LiNiO2"
active_mass_mg = 10.0
active_mass_sigma_mg = 0.1
starting_composition = 1.0
starting_composition_sigma = 0.01
[techniques.echem]
cell = "Zelle <b>1</b>"
files = ["raw/*.csv"]
clock = { start = "2026-03-01T10:00:00" }
[techniques.xas]
cell = "Zelle <b>1</b>"
files = ["raw/scan*.xdi"]
clock = { exposure_s = 60.0 }
"""


def spectrum(path, minute, n=101):
    energy = np.linspace(8300, 8400, n)
    mu = 1/(1 + np.exp(-(energy - 8345 - 0.01*minute)/1.5))
    header = f"# XDI/1.0\n# Column.1: energy eV\n# Column.2: mutrans\n# Element.symbol: Ni\n# Element.edge: K\n# Scan.start_time: 2026-03-01T10:{minute:02d}:00\n# ---\n"
    path.write_text(header + "\n".join(f"{e:.2f} {m:.6f}" for e, m in zip(energy, mu, strict=True)) + "\n", encoding="utf-8")


def make_campaign(parent):
    """One cell at C/2 with six spectra, ten minutes apart; names with quotes, accents and markup."""
    campaign = parent/"campagne <i>é</i>"
    (campaign/"raw").mkdir(parents=True)
    t = np.arange(0, 3601, 10)
    (campaign/"raw"/"cell.csv").write_text("test_time_second,voltage_volt,current_ampere\n" + "\n".join(f"{s},{3.5 + s/7200:.5f},0.001" for s in t) + "\n")
    for i in range(6): spectrum(campaign/"raw"/STRANGE.format(i), 10*i)
    (campaign/"campaign.toml").write_text(MANIFEST, encoding="utf-8")
    return campaign


@pytest.fixture
def folder(tmp_path): return make_campaign(tmp_path)


def test_raw_files_become_joined_frames(folder):
    joined = Campaign.open(folder).ingest(progress=False).joined("xas")
    assert joined.sizes["time"] == 6
    np.testing.assert_allclose(joined.voltage, 3.5 + (np.arange(6)*600 + 30)/7200, atol=2e-5)
    x = 1 - (np.arange(6)*600 + 30)/3600/10e-3*1e-3/0.27452
    np.testing.assert_allclose(joined.lithium_content, x, atol=2e-4)
    assert (joined.lithium_content_sigma > 0).all()
    assert [str(s) for s in joined.source.values] == [STRANGE.format(i) for i in range(6)]
    assert [h["function"] for h in history(joined)][0] == "campaign.ingest"


def test_a_second_run_does_nothing_and_a_changed_file_is_read_again(folder):
    campaign = Campaign.open(folder).ingest(progress=False)
    stamps = lambda: {p.name: p.stat().st_mtime_ns for p in folder.rglob("*.h5")}
    before = stamps()
    assert set(campaign.ingest(progress=False).store.stages()) == {("echem", "raw"), ("xas", "raw")} and stamps() == before
    spectrum(folder/"raw"/STRANGE.format(6), 59)
    campaign.ingest(progress=False)
    assert campaign["xas"].sizes["time"] == 7
    assert sum(n.startswith("xas.raw") for n in stamps()) == 1 and {n for n in stamps() if n.startswith("echem")} <= set(before)


def test_the_tree_and_the_stages_hold_the_same(folder):
    campaign = Campaign.open(folder).ingest(progress=False)
    with campaign.tree as tree: xr.testing.assert_equal(tree["xas/raw"].to_dataset().load(), campaign["xas/raw"].load())


def test_a_further_stage_is_saved_and_comes_first(folder):
    campaign = Campaign.open(folder).ingest(progress=False)
    campaign.save("xas/clean", campaign["xas"].load()*2)
    assert float(campaign["xas"].mu[0, -1]) == pytest.approx(2*float(campaign["xas/raw"].mu[0, -1]))
    with pytest.raises(BattError, match="raw is written by ingest alone"): campaign.save("xas/raw", campaign["xas"])


def test_export_opens_in_the_next_reader(folder, tmp_path):
    campaign = Campaign.open(folder).ingest(progress=False)
    out = campaign.export(tmp_path/"out")
    spectra = sorted((out/"xas").glob("*.xdi"))
    assert len(spectra) == 6
    again = read(spectra[2], technique="xas")
    np.testing.assert_allclose(again.mu, campaign["xas"].mu[2], rtol=1e-6)
    table = (out/"echem"/"echem_frames.csv").read_text().splitlines()
    assert table[0].startswith("time (s)") and len(table) == 362


@pytest.mark.parametrize(("old", "new", "message"), [
    ("starting_composition", "starting_compositon", "did you mean starting_composition"),
    ("active_mass_mg = 10.0", "active_mass_mg = 'ten'", "active_mass_mg"),
    ("raw/scan*.xdi", "../*.xdi", "leads out of the campaign"),
    ("raw/scan*.xdi", "/etc/host*", "leads out of the campaign"),
    ("raw/scan*.xdi", "raw/none*.xdi", "no file matches"),
    ("exposure_s", "exposures", "did you mean exposure_s"),
    ("[techniques.xas]", "[techniques.xsa]", "techniques.xsa.kind"),
    ("[campaign]\n", "[campaign]\nraw_root = 'nowhere'\n", "raw_root"),
    ("clock = { exposure_s = 60.0 }", "hints = { colums = {} }", "unknown hint 'colums'"),
])
def test_a_wrong_manifest_is_refused_by_key_and_mend(folder, old, new, message):
    path = folder/"campaign.toml"
    path.write_text(MANIFEST.replace(old, new), encoding="utf-8")
    with pytest.raises(BattError, match=message): Campaign.open(folder).ingest(progress=False)
    assert not list((folder/"store").glob("xas*")) if (folder/"store").exists() else True


def test_a_link_out_of_the_campaign_is_refused_and_raw_root_allows_it(folder, tmp_path):
    elsewhere = tmp_path/"elsewhere"; elsewhere.mkdir()
    spectrum(elsewhere/"scan_7.xdi", 7)
    (folder/"raw"/"scan_7.xdi").symlink_to(elsewhere/"scan_7.xdi")
    with pytest.raises(BattError, match="a link leads out of the campaign folder"): Campaign.open(folder).ingest(progress=False)


def test_an_archive_that_climbs_out_is_refused(folder):
    import zipfile
    with zipfile.ZipFile(folder/"raw"/"scan.zip", "w") as z: z.writestr("../../evil.xdi", "x")
    (folder/"campaign.toml").write_text(MANIFEST.replace("raw/scan*.xdi", "raw/scan.zip::*"), encoding="utf-8")
    with pytest.raises(BattError, match="points out of the archive"): Campaign.open(folder).ingest(progress=False)


def test_a_file_that_vanishes_is_named(folder):
    campaign = Campaign.open(folder)
    found = campaign.sources("xas")
    (folder/"raw"/STRANGE.format(0)).unlink()
    with pytest.raises(BattError, match="the raw file has vanished"): found[0].fingerprint()


def test_clocks_that_do_not_overlap(folder):
    path = folder/"campaign.toml"
    path.write_text(MANIFEST.replace("2026-03-01T10:00:00", "2026-04-01T10:00:00"), encoding="utf-8")
    with pytest.raises(BattError, match="overlap"): Campaign.open(folder).ingest(progress=False).joined("xas")


def test_a_zone_on_one_clock_only_is_refused(folder):
    (folder/"campaign.toml").write_text(MANIFEST.replace('clock = { start', 'clock = { timezone = "Europe/Paris", start'), encoding="utf-8")
    with pytest.raises(BattError, match="time zone"): Campaign.open(folder).ingest(progress=False).joined("xas")


def test_two_runs_at_once(folder):
    campaign = Campaign.open(folder)
    code = f"""
        from batt_nb.campaign.store import Store
        with Store({str(folder)!r}).lock(): print("held", flush=True); input()
    """
    p = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "held\n"
    with pytest.raises(BattError, match="another run is working"): campaign.ingest(progress=False)
    p.kill(); p.wait()
    campaign.ingest(progress=False)


def test_a_failing_technique_keeps_the_finished_ones(folder):
    (folder/"raw"/"scan_bad.xdi").write_bytes(b"")
    campaign = Campaign.open(folder)
    with pytest.raises(BattError, match="the file is empty.*scan_bad.xdi"): campaign.ingest(progress=False)
    assert list(campaign.store.stages()) == [("echem", "raw")]
    (folder/"raw"/"scan_bad.xdi").unlink()
    assert campaign.ingest(progress=False)["xas"].sizes["time"] == 6


def test_an_unreadable_folder_is_said_once_not_half_written(folder):
    if os.getuid() == 0: pytest.skip("root may write everywhere; the store's own test stands in for it")
    folder.chmod(0o500)
    try:
        with pytest.raises(BattError, match="write permission"): Campaign.open(folder).ingest(progress=False)
    finally: folder.chmod(0o700)


def test_a_draft_from_raw_files_loads_and_ingests(folder):
    (folder/"campaign.toml").unlink()
    (folder/"raw"/"notes é <b>.txt").write_text("a note\n\ncell = 1")
    draft_manifest(folder, progress=False)
    manifest = load_manifest(folder)
    assert set(manifest.techniques) == {"echem", "xas"}
    assert Campaign.open(folder).ingest(progress=False)["xas"].sizes["time"] == 6


def test_an_archive_of_spectra_is_read_as_a_series(folder, tmp_path):
    import tarfile
    with tarfile.open(tmp_path/"spectra.tar.xz", "w:xz") as t:
        for p in (folder/"raw").glob("*.xdi"): t.add(p, p.name)
    series = read(tmp_path/"spectra.tar.xz")
    assert series.sizes["time"] == 6 and series.attrs["start_time"].startswith("2026-03-01T10:00")
    beside = read(folder/"raw", technique="xas")
    assert flags(series) == [] and flags(beside) == ["left out, of no known format of xas: raw::cell.csv"]
    np.testing.assert_array_equal(series.mu, beside.mu)


def test_import_is_quick_and_light():
    code = "import sys, time; t = time.perf_counter(); import batt_nb; print(time.perf_counter() - t, [m for m in ('torch', 'pandas', 'holoviews', 'xarray', 'pyFAI') if m in sys.modules])"
    seconds, loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(" ", 1)
    assert loaded.strip() == "[]"
