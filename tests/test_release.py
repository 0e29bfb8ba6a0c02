"""A release stands alone, gives the same data, is described for people and machines, and appears whole or not at all."""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import h5py
import numpy as np
import pytest
import xarray as xr
from batt_nb.campaign import Campaign
from batt_nb.campaign.releasing import (
    catches,
    companions,
    copy_file,
    facts_of,
    parse_author,
    parse_license,
    plain,
    verify_release,
    whole_folder,
    with_raw_root,
)
from batt_nb.core import BattError
from test_campaign import MANIFEST, STRANGE, make_campaign, spectrum

DAY = "2026-03-01"
CITED = """[campaign]
authors = ["Carberry, Josiah (0000-0002-1825-0097)", "Johannes van der Waals", "batt_nb developers"]
license = "CC-BY-4.0"
doi = "doi:10.5281/zenodo.1234567"
description = "Six spectra; see <b>below</b>."
"""


def citable(manifest=MANIFEST, **changed):
    """The manifest of the tiny campaign with what a citation needs; a value of None takes a key out."""
    text = manifest.replace("[campaign]\n", CITED)
    for key, value in changed.items():
        text = re.sub(rf"(?m)^{key} = .*\n", "" if value is None else f"{key} = {json.dumps(value)}\n", text)
    return text


@pytest.fixture
def folder(tmp_path):
    folder = make_campaign(tmp_path)
    (folder/"campaign.toml").write_text(citable(), encoding="utf-8")
    return folder


def files(folder): return {p.relative_to(folder).as_posix(): p for p in Path(folder).rglob("*") if p.is_file()}


def rewrite(folder, *pairs):
    path = folder/"campaign.toml"
    text = path.read_text(encoding="utf-8")
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def same_stages(a, b):
    """The raw stages of two campaigns are identical: values, coordinates, attributes."""
    assert set(a.store.stages()) == set(b.store.stages())
    for name in a.techniques: xr.testing.assert_identical(a[f"{name}/raw"].load(), b[f"{name}/raw"].load())


# ---- what it holds, and that it gives the same data

def test_a_release_is_whole_and_verifies(folder):
    release = Campaign.open(folder).release(version="1.2.0", date=DAY)
    assert release.parent == folder/"release" and release.name.endswith("-1.2.0")
    held = files(release)
    assert {"campaign.toml", "CITATION.cff", "LICENSE", "README.md", "checksums.sha256", "ro-crate-metadata.json", "raw/cell.csv"} <= set(held)
    assert sum(n.startswith("store/") for n in held) == 2 and sum(n.endswith(".xdi") for n in held) == 6
    assert len((release/"checksums.sha256").read_text(encoding="utf-8").splitlines()) == len(held) - 1
    assert verify_release(release) == []
    if shutil.which("sha256sum"): assert subprocess.run(["sha256sum", "-c", "--quiet", "checksums.sha256"], cwd=release, check=False).returncode == 0


def test_its_stages_are_up_to_date_in_the_release(folder):
    """Nothing is read again: names and times of change of the stages stand."""
    campaign = Campaign.open(folder)
    release = campaign.release(date=DAY)
    before = {n: p.stat().st_mtime_ns for n, p in files(release/"store").items()}
    same_stages(campaign, Campaign.open(release).ingest(progress=False))
    assert {n: p.stat().st_mtime_ns for n, p in files(release/"store").items()} == before
    assert verify_release(release) == [], "the index and the lock are no part of it"


def test_its_raw_files_give_the_same_stages(folder, tmp_path):
    campaign = Campaign.open(folder)
    copy = Path(shutil.copytree(campaign.release(date=DAY), tmp_path/"copy"))
    shutil.rmtree(copy/"store")
    shutil.rmtree(folder/"raw")
    same_stages(campaign, Campaign.open(copy).ingest(progress=False))


def test_raw_files_from_elsewhere_come_into_raw(folder, tmp_path):
    away = tmp_path/"beamline disk é"
    away.mkdir(); shutil.move(folder/"raw", away/"raw")
    rewrite(folder, ("[campaign]\n", f"# the disk of the beamline\n[campaign] # ours\nraw_root = {json.dumps(str(away))} # mounted here\n"))
    campaign = Campaign.open(folder)
    release = campaign.release(date=DAY)
    assert (release/"raw"/"raw"/"cell.csv").read_bytes() == (away/"raw"/"cell.csv").read_bytes()
    text = (release/"campaign.toml").read_text(encoding="utf-8")
    assert 'raw_root = "raw" # mounted here' in text and "# the disk of the beamline" in text
    for name, path in files(release).items(): assert str(tmp_path).encode() not in path.read_bytes(), name
    copy = Path(shutil.copytree(release, tmp_path/"copy"))
    shutil.rmtree(copy/"store"); shutil.rmtree(away)
    same_stages(campaign, Campaign.open(copy).ingest(progress=False))


def test_the_raw_root_of_the_command_line_counts(folder, tmp_path):
    away = tmp_path/"mounted"
    away.mkdir(); shutil.move(folder/"raw", away/"raw")
    release = Campaign.open(folder, away).release(tmp_path/"out", date=DAY, store=False)
    assert 'raw_root = "raw"' in (release/"campaign.toml").read_text(encoding="utf-8") and (release/"raw"/"raw"/"cell.csv").is_file()
    assert Campaign.open(release).ingest(progress=False)["xas"].sizes["time"] == 6


def test_the_same_input_gives_the_same_bytes(folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path/"other"/"name"))
    one = Campaign.open(folder).release(date=DAY)
    time.sleep(1.1)  # HDF5 counts in seconds
    two = Campaign.open(other).release(tmp_path/"two", date=DAY)
    assert {n: p.read_bytes() for n, p in files(one).items()} == {n: p.read_bytes() for n, p in files(two).items()}


def test_the_date_is_today_unless_given(folder):
    release = Campaign.open(folder).release(store=False)
    assert time.strftime("%Y-%m-%d") in (release/"CITATION.cff").read_text(encoding="utf-8")


def test_truth_and_further_stages_are_released(folder):
    (folder/"truth").mkdir(); (folder/"truth"/"lithium.csv").write_text("1,2\n")
    (folder/"notes.txt").write_text("private")
    campaign = Campaign.open(folder).ingest(progress=False)
    campaign.save("xas/clean", campaign["xas"].load()*2)
    release = campaign.release(date=DAY)
    assert (release/"truth"/"lithium.csv").read_text() == "1,2\n" and not (release/"notes.txt").exists()
    np.testing.assert_array_equal(Campaign.open(release)["xas/clean"].mu, campaign["xas/clean"].mu)


def test_without_raw_files_or_without_stages(folder, tmp_path):
    campaign = Campaign.open(folder)
    stages = campaign.release(tmp_path/"stages", date=DAY, raw=False)
    assert not (stages/"raw").exists() and verify_release(stages) == []
    np.testing.assert_array_equal(Campaign.open(stages)["xas"].mu, campaign["xas"].mu)
    raw = campaign.release(tmp_path/"raw only", date=DAY, store=False)
    assert not (raw/"store").exists() and verify_release(raw) == []
    same_stages(campaign, Campaign.open(raw).ingest(progress=False))
    with pytest.raises(BattError, match="is empty"): campaign.release(tmp_path/"none", raw=False, store=False)


def test_an_archive_is_copied_whole_and_once(folder):
    with tarfile.open(folder/"raw"/"scans.tar.xz", "w:xz") as tar:
        for p in sorted((folder/"raw").glob("*.xdi")): tar.add(p, f"day1/{p.name}"); p.unlink()
        log = "key,start_time,end_time\n" + "".join(f"{STRANGE.format(i)[:-4]},2026-03-01T10:{10*i:02d}:00,2026-03-01T10:{10*i:02d}:30\n" for i in range(6)).replace('"q"', '""q""')
        log = "\n".join(f'"{line.split(",2026")[0]}",2026{line.split(",2026", 1)[1]}' if "2026" in line else line for line in log.splitlines())
        info = tarfile.TarInfo("log.csv"); info.size = len(log.encode()); tar.addfile(info, io.BytesIO(log.encode()))
    rewrite(folder, ("raw/scan*.xdi", "raw/scans.tar.xz::day1/*.xdi"), ("clock = { exposure_s = 60.0 }", 'clock = { table = "raw/scans.tar.xz::log.csv", key = "key" }'))
    campaign = Campaign.open(folder)
    release = campaign.release(date=DAY)
    assert sorted(p.name for p in (release/"raw").iterdir()) == ["cell.csv", "scans.tar.xz"]
    assert (release/"raw"/"scans.tar.xz").read_bytes() == (folder/"raw"/"scans.tar.xz").read_bytes()
    shutil.rmtree(release/"store")
    same_stages(campaign, Campaign.open(release).ingest(progress=False))


def test_a_measurement_that_is_a_folder_is_copied_whole(folder):
    for i in (1, 2):
        (folder/"raw"/"nmr"/str(i)/"pdata"/"1").mkdir(parents=True)
        for name in ("acqus", "fid", "pdata/1/procs", ".DS_Store"): (folder/"raw"/"nmr"/str(i)/name).write_text(f"{name} {i}")
    rewrite(folder, ("[techniques.xas]", '[techniques.nmr]\ncell = "Zelle <b>1</b>"\nfiles = ["raw/nmr/*"]\n[techniques.xas]'))
    campaign = Campaign.open(folder)
    release = campaign.release(date=DAY, store=False)
    assert {n for n in files(release) if "nmr" in n} == {f"raw/nmr/{i}/{n}" for i in (1, 2) for n in ("acqus", "fid", "pdata/1/procs")}
    assert Campaign.open(release).stage_hash("nmr") == campaign.stage_hash("nmr")


# ---- files that belong together, links, names

def test_links_are_copied_as_what_they_lead_to(folder, tmp_path):
    (folder/"attic").mkdir()
    spectrum(folder/"attic"/"x.xdi", 59)
    (folder/"raw"/"scan_9.xdi").symlink_to("../attic/x.xdi")
    release = Campaign.open(folder).release(date=DAY)
    assert not (release/"raw"/"scan_9.xdi").is_symlink() and (release/"raw"/"scan_9.xdi").read_bytes() == (folder/"attic"/"x.xdi").read_bytes()
    assert Campaign.open(release).ingest(progress=False)["xas"].sizes["time"] == 7


@pytest.mark.parametrize("where", ["raw/scan_9.xdi", "raw/nmr/1/acqus", "truth/secret"])
def test_a_link_out_of_the_campaign_is_not_published(folder, tmp_path, where):
    (tmp_path/"secret").write_text("secret")
    (folder/"raw"/"nmr"/"1").mkdir(parents=True); (folder/"truth").mkdir()
    (folder/where).symlink_to(tmp_path/"secret")
    rewrite(folder, ("[techniques.xas]", '[techniques.nmr]\ncell = "Zelle <b>1</b>"\nfiles = ["raw/nmr/*"]\n[techniques.xas]'))
    with pytest.raises(BattError, match="a link leads out"): Campaign.open(folder).release(date=DAY, store=False)
    assert not (folder/"release").exists()


def hdf5(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = h5py.VirtualLayout((2, 3), float)
    layout[...] = h5py.VirtualSource(source, "image", (2, 3))
    with h5py.File(path, "w") as f: f.create_virtual_dataset("entry/image", layout)


def test_what_an_hdf5_file_points_to_comes_along(folder):
    hdf5(folder/"raw"/"ct"/"master.h5", "more/data_1.h5")
    (folder/"raw"/"ct"/"more").mkdir()
    with h5py.File(folder/"raw"/"ct"/"more"/"data_1.h5", "w") as f: f["image"] = h5py.ExternalLink("../../pixels.h5", "/image")
    with h5py.File(folder/"raw"/"pixels.h5", "w") as f: f["image"] = np.arange(6.0).reshape(2, 3)
    rewrite(folder, ("[techniques.xas]", '[techniques.xct]\ncell = "Zelle <b>1</b>"\nfiles = ["raw/ct/*.h5"]\n[techniques.xas]'))
    release = Campaign.open(folder).release(date=DAY, store=False)
    shutil.rmtree(folder/"raw")
    with h5py.File(release/"raw"/"ct"/"master.h5") as f: np.testing.assert_array_equal(f["entry/image"], np.arange(6.0).reshape(2, 3))


def test_an_absolute_link_in_hdf5_is_refused(tmp_path):
    with h5py.File(tmp_path/"away.h5", "w") as f: f["image"] = np.ones((2, 3))
    hdf5(tmp_path/"in"/"master.h5", str(tmp_path/"away.h5"))
    with pytest.raises(BattError, match="has no place in a release"): companions(tmp_path/"in"/"master.h5", {})
    shutil.copy(tmp_path/"away.h5", tmp_path/"in")
    assert companions(tmp_path/"in"/"master.h5", {}) == [tmp_path/"in"/"away.h5"]


def test_the_images_of_an_stxm_header_come_along(tmp_path):
    for name in ("stack.hdr", "stack_a000.xim", "stack_a001.xim", "other_a000.xim", "beam.txt"): (tmp_path/name).write_text("1 2")
    assert [p.name for p in companions(tmp_path/"stack.hdr", {"i0": "beam.txt"})] == ["stack_a000.xim", "stack_a001.xim", "beam.txt"]
    for name in ("stack_a000.xim", "stack_a001.xim"): (tmp_path/name).unlink()
    with zipfile.ZipFile(tmp_path/"images.zip", "w") as z: z.writestr("stack_a000.xim", "1 2")
    assert [p.name for p in companions(tmp_path/"stack.hdr", {"i0": "brightest"})] == ["images.zip"]


def test_a_raw_file_with_the_name_of_a_release_file_moves_into_raw(folder, tmp_path):
    for p in list((folder/"raw").iterdir()): shutil.move(p, folder/p.name)
    shutil.move(folder/"cell.csv", folder/"README.md")  # an instrument that names so
    rewrite(folder, ("raw/*.csv", "README.md"), ("raw/scan*.xdi", "*.xdi"))
    campaign = Campaign.open(folder)
    release = campaign.release(date=DAY)
    assert (release/"raw"/"README.md").read_bytes() == (folder/"README.md").read_bytes() and (release/"README.md").read_text(encoding="utf-8").startswith("# Tiny")
    shutil.rmtree(release/"store")
    same_stages(campaign, Campaign.open(release).ingest(progress=False))


def test_a_pattern_that_would_find_release_files_moves_the_raw_files(folder):
    shutil.move(folder/"raw"/"cell.csv", folder/"cell.csv")
    rewrite(folder, ("raw/*.csv", "c*.csv"), ("raw/scan*.xdi", "[rs]*/scan*.xdi"))
    release = Campaign.open(folder).release(date=DAY, store=False)
    assert (release/"cell.csv").is_file()
    rewrite(folder, ('files = ["c*.csv"]', 'files = ["cell.csv", "[cC]*.c*"]'))
    release = Campaign.open(folder).release(version="2.0.0", date=DAY, store=False)
    assert (release/"raw"/"cell.csv").is_file() and 'raw_root = "raw"' in (release/"campaign.toml").read_text(encoding="utf-8")
    assert [s.path.name for s in Campaign.open(release).sources("echem")] == ["cell.csv"]


def test_a_release_that_the_campaign_would_read_is_refused(folder, tmp_path):
    rewrite(folder, ("raw/scan*.xdi", "**/scan*.xdi"))
    campaign = Campaign.open(folder)
    with pytest.raises(BattError, match="would find the files of the release"): campaign.release(date=DAY, store=False)
    assert not (folder/"release").exists()
    release = campaign.release(tmp_path/"outside", date=DAY, store=False)
    assert len(campaign.sources("xas")) == len(Campaign.open(release).sources("xas")) == 6


@pytest.mark.parametrize(("pattern", "path", "found"), [
    ("raw/*.xdi", "raw/a.xdi", True), ("./raw/*.xdi", "raw/a.xdi", True), ("**/*.xdi", "a.xdi", True), ("**", "a/b", True), ("*", "raw/nmr/fid", True),
    ("a.zip::*.xdi", "a.zip", True), ("*.xdi", "raw/a.xdi", False), ("raw/*/x", "raw/a", False), ("raw/[0-9]*", "raw/a", False)])
def test_what_a_pattern_catches(pattern, path, found, tmp_path):
    assert catches(pattern, path) is found
    if found and "::" not in pattern and not pattern == "*":
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True); (tmp_path/path).write_text("")
        import glob
        assert path in [PurePosixPath(p).as_posix() for p in glob.glob(pattern, root_dir=tmp_path, recursive=True)]


def test_names_that_are_one_on_other_systems_are_refused(folder):
    for name in ("scan_a.xdi", "scan_A.xdi"): spectrum(folder/"raw"/name, 58)
    if len(list((folder/"raw").glob("scan_[aA].xdi"))) < 2: pytest.skip("this file system does not tell a from A")
    with pytest.raises(BattError, match="are one name on Windows and macOS"): Campaign.open(folder).release(date=DAY, store=False)


# ---- what is refused, and whole or not at all

@pytest.mark.parametrize(("changed", "options", "message"), [
    ({"license": None}, {}, "key campaign.license.*CC-BY-4.0"), ({"license": ""}, {}, "key campaign.license"), ({"license": "CC BY 4.0"}, {}, "did you mean CC-BY-4.0"),
    ({"license": "ask us"}, {}, "no SPDX identifier"), ({"license": "LicenseRef-ours"}, {}, "file LICENSE"),
    ({"authors": None}, {}, "key campaign.authors"), ({"authors": []}, {}, "key campaign.authors"), ({"authors": ["Doe, Jane (0000-0002-1825-0098)"]}, {}, "check digit"), ({"authors": [" , "]}, {}, "has no name"),
    ({"doi": "zenodo.12"}, {}, "key campaign.doi"), ({}, {"date": "yesterday"}, "ISO 8601"),
    *(({}, {"version": v}, "no semantic version") for v in ("1", "1.0", "v1.0.0", "1.0.0.0", "01.0.0", "1.0.0-", "1.0.0+", "1.0.0-01", "١.0.0", "1.0.0\n", "../1.0.0"))])
def test_what_cannot_be_cited_is_refused(folder, changed, options, message):
    (folder/"campaign.toml").write_text(citable(**changed), encoding="utf-8")
    with pytest.raises(BattError, match=message): Campaign.open(folder).release(**{"date": DAY} | options)
    assert not (folder/"release").exists() and not (folder/"store").exists()


@pytest.mark.parametrize("version", ["0.0.1", "1.0.0-alpha.1", "10.20.30+build.7", "1.0.0-0A.is.legal"])
def test_semantic_versions_pass(folder, version): assert facts_of(Campaign.open(folder), version, DAY).version == version


def test_a_folder_that_exists_is_never_written_into(folder, tmp_path):
    campaign = Campaign.open(folder)
    release = campaign.release(date=DAY, store=False)
    before = {n: p.read_bytes() for n, p in files(release).items()}
    with pytest.raises(BattError, match="a release is never changed"): campaign.release(date=DAY, store=False)
    assert {n: p.read_bytes() for n, p in files(release).items()} == before
    (tmp_path/"empty").mkdir(); (tmp_path/"dangling").symlink_to(tmp_path/"nowhere")
    for target in ("empty", "dangling"):
        with pytest.raises(BattError, match="exists already"): campaign.release(tmp_path/target, date=DAY, store=False)


def test_a_full_disk_leaves_nothing(folder, tmp_path):
    """A limit on the size of files stops the copy where a full disk would."""
    (folder/"raw"/"scan_big.xdi").write_bytes(b"x"*2_000_000)
    code = f"""
        import resource, signal
        from batt_nb.campaign import Campaign
        from batt_nb.core import BattError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        try: Campaign.open({str(folder)!r}).release(date="{DAY}", store=False)
        except BattError as e: print("refused:", e)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert "refused: the disk is full; nothing was left half-written" in out.stdout, out.stdout + out.stderr
    assert not (folder/"release").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small file system")
def test_a_really_full_file_system(folder, tmp_path):
    (folder/"raw"/"scan_big.xdi").write_bytes(b"x"*2_000_000)
    disk = tmp_path/"disk"; disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode: pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(BattError, match="the disk is full"): Campaign.open(folder).release(disk/"release"/"a-1.0.0", date=DAY, store=False)
        assert list(disk.iterdir()) == []
    finally: subprocess.run(["umount", "-l", str(disk)], check=False)


def test_no_permission_is_said(folder, tmp_path, monkeypatch):
    if os.getuid() == 0:
        import errno
        mkdir = Path.mkdir
        def refuse(self, *a, **k):
            if "locked" in str(self): raise PermissionError(errno.EACCES, "Permission denied", str(self))
            return mkdir(self, *a, **k)
        monkeypatch.setattr(Path, "mkdir", refuse)
    else: (tmp_path/"locked").mkdir(mode=0o500)
    with pytest.raises(BattError, match="cannot be written to.*write permission"): Campaign.open(folder).release(tmp_path/"locked"/"a", date=DAY, store=False)


SLOW = """
    import time
    from batt_nb.campaign import Campaign, releasing
    copy = releasing.copy_file
    def slow(*a): print("copying", flush=True); time.sleep(0.3); return copy(*a)
    releasing.copy_file = slow
    Campaign.open({folder!r}).release(date="2026-03-01", store=False)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interruption_leaves_no_half_release(folder, how):
    p = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SLOW.format(folder=str(folder)))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(3): assert "copying" in p.stdout.readline()
    assert [d.name[0] for d in (folder/"release").iterdir()] == ["."], "nothing is seen before it is whole"
    p.send_signal(how); p.communicate()
    left = list((folder/"release").iterdir()) if (folder/"release").exists() else []
    assert all(d.name.startswith(".") and d.name.endswith(".part") for d in left) and len(left) == (how == signal.SIGKILL)
    release = Campaign.open(folder).release(date=DAY, store=False)
    assert list((folder/"release").iterdir()) == [release] and verify_release(release) == [], "the next run clears away what a kill left"


def test_another_run_that_is_alive_is_left_alone(tmp_path):
    with whole_folder(tmp_path/"a") as mine:
        with pytest.raises(BattError, match="exists already"), whole_folder(tmp_path/"a") as theirs:
            assert mine.is_dir() and theirs != mine
            (tmp_path/"a").mkdir()
        (tmp_path/"a").rmdir()
    assert (tmp_path/"a").is_dir() and len(list(tmp_path.iterdir())) == 1


def test_a_fault_of_a_raw_file_is_said_of_that_file(folder, tmp_path, monkeypatch):
    source = folder/"raw"/"cell.csv"
    with pytest.raises(BattError, match="cannot be read.*gone.csv"): copy_file(tmp_path/"gone.csv", tmp_path/"x")
    stat, calls = Path.stat, []
    def growing(self, **k):
        if self == source:
            calls.append(1)
            if len(calls) == 2: source.write_text("more")
        return stat(self, **k)
    monkeypatch.setattr(Path, "stat", growing)
    with pytest.raises(BattError, match="changed while it was copied"): copy_file(source, tmp_path/"y")


# ---- verifying

def test_a_changed_byte_is_found(folder):
    release = Campaign.open(folder).release(date=DAY)
    for name in ("raw/cell.csv", "campaign.toml", next(n for n in files(release) if n.startswith("store/xas"))):
        whole = (release/name).read_bytes()
        stamp = (release/name).stat()
        (release/name).write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
        os.utime(release/name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert verify_release(release) == [f"{name} has changed"]
        (release/name).write_bytes(whole)
    assert verify_release(release) == []


def test_missing_extra_and_swapped_files_are_found(folder, tmp_path):
    release = Campaign.open(folder).release(date=DAY, store=False)
    (release/"LICENSE").unlink(); (release/"raw"/"more.csv").write_text("1")
    shutil.move(release/"raw"/"cell.csv", tmp_path); (release/"raw"/"cell.csv").symlink_to(tmp_path/"cell.csv")
    assert verify_release(release) == ["LICENSE is missing", "raw/cell.csv has changed", "raw/more.csv is extra"]
    with open(release/"checksums.sha256", "a", encoding="utf-8") as f: f.write(f"nonsense\n{'0'*64}  ../../secret\n")
    assert sum("cannot be read" in p for p in verify_release(release)) == 2
    with pytest.raises(BattError, match="no checksums.sha256"): verify_release(tmp_path)


def test_a_line_break_in_a_name_survives(folder):
    spectrum(folder/"raw"/"scan_a\nb\\c.xdi", 58)
    release = Campaign.open(folder).release(date=DAY, store=False)
    assert verify_release(release) == []
    if shutil.which("sha256sum"): assert subprocess.run(["sha256sum", "-c", "--quiet", "checksums.sha256"], cwd=release, check=False).returncode == 0
    assert len(Campaign.open(release).sources("xas")) == 7


# ---- for people and machines

def test_text_from_files_never_becomes_markup(folder):
    import mistune
    evil = "<script>alert(1)</script> <img src=x onerror=alert(2)> **b** [c](http://d) http://e.f www.g.h ~~i~~ | `j` $k$ ![l](m) &lt; {n}"
    rewrite(folder, ('name = "Tiny <script>alert(1)</script> é"', f"name = {json.dumps(evil)}"), ('description = "Six spectra; see <b>below</b>."', f'description = {json.dumps(f"- {evil}{chr(10)*2}# {evil}{chr(10)*2}1. {evil}{chr(10)*2}    {evil}")}\ncitation = {json.dumps(evil)}'),
            ("active_mass_mg = 10.0", f"active_mass_mg = 10.0\nprotocol = {json.dumps(evil)}\nelectrode_batch = {json.dumps('| x |' + evil)}"), ('"Johannes van der Waals"', json.dumps(evil)))
    release = Campaign.open(folder).release(date=DAY, store=False)
    html = mistune.create_markdown(escape=False, plugins=["table", "url", "strikethrough", "task_lists", "footnotes", "math"])((release/"README.md").read_text(encoding="utf-8"))
    assert set(re.findall(r"<\s*(\w+)", html)) == {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "a"}
    assert set(re.findall(r'href="([^"]*)"', html)) == {"https://doi.org/10.5281/zenodo.1234567", "https://creativecommons.org/licenses/by/4.0/"}
    assert html.count("<h1>") == 1 and html.count("<h2>") == 5 and len(re.findall("<td", html)) == 7*1 + 7*2 + 2*len(re.findall("<tr>", html.split("What lies where")[1])) - 2
    seen = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html)).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").replace("&quot;", '"').replace("&#39;", "'")
    assert seen.count(evil) >= 7, "and it reads as it was written"


@pytest.mark.parametrize("text", ["- a", "+ a", "1. a", "12) a", "===", "# a", "> a", "a_b_c", "\\*a*", "| a |", "<a@b.c>", "```", "a  \nb", "[x]: y", "[ ] a"])
def test_plain_text_stays_plain(text):
    import mistune
    html = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "task_lists", "footnotes"])(plain(text))
    assert re.fullmatch(r"<p>[^<]*</p>\n", html), html


def test_the_citation_file(folder):
    yaml = pytest.importorskip("yaml")
    rewrite(folder, ('name = "Tiny <script>', 'citation = "Carberry et al.: \\"Tiny\\", 2026"\nname = "Tiny: \\"#1\\" \U0001f50b <script>'))
    cff = yaml.safe_load((Campaign.open(folder).release(version="1.2.3", date=DAY, store=False)/"CITATION.cff").read_text(encoding="utf-8"))
    assert cff == {
        "cff-version": "1.2.0", "type": "dataset", "title": 'Tiny: "#1" \U0001f50b <script>alert(1)</script> é', "version": "1.2.3", "date-released": __import__("datetime").date(2026, 3, 1),
        "message": 'Please cite as: Carberry et al.: "Tiny", 2026', "license": "CC-BY-4.0", "doi": "10.5281/zenodo.1234567", "abstract": "Six spectra; see <b>below</b>.",
        "authors": [{"family-names": "Carberry", "given-names": "Josiah", "orcid": "https://orcid.org/0000-0002-1825-0097"}, {"family-names": "van der Waals", "given-names": "Johannes"}, {"name": "batt_nb developers"}]}


@pytest.mark.parametrize(("text", "given", "family", "orcid", "person"), [
    ("Ludwig van Beethoven", "Ludwig", "van Beethoven", "", True), ("Jean-Marie Tarascon", "Jean-Marie", "Tarascon", "", True), ("María de los Ángeles", "María", "de los Ángeles", "", True),
    ("de la Cruz, Ana <0000-0002-1694-233X>", "Ana", "de la Cruz", "0000-0002-1694-233X", True), ("SOLEIL", "", "SOLEIL", "", False), ("The ROCK Collaboration", "", "The ROCK Collaboration", "", False),
    ("Plato https://orcid.org/0000-0002-1825-0097", "", "Plato", "0000-0002-1825-0097", True), ("  Marie   Curie  ", "Marie", "Curie", "", True)])
def test_names_of_authors(text, given, family, orcid, person):
    author = parse_author(text)
    assert (author.given, author.family, author.orcid, author.person) == (given, family, orcid, person)


def test_licenses(folder, tmp_path):
    assert parse_license("odbl-1.0", folder).url.startswith("https://opendatacommons.org/")
    assert parse_license("https://example.org/terms", folder).spdx == ""
    (folder/"LICENSE.txt").write_text("All rights, and the terms of the beamtime.\n")
    rewrite(folder, ('"CC-BY-4.0"', '"LicenseRef-beamtime"'))
    release = Campaign.open(folder).release(date=DAY, store=False)
    assert (release/"LICENSE").read_text() == "All rights, and the terms of the beamtime.\n"
    assert "\nlicense" not in (release/"CITATION.cff").read_text(encoding="utf-8")


def test_the_crate_describes_what_is_there(folder):
    from rocrate.rocrate import ROCrate
    (folder/"truth").mkdir(); (folder/"truth"/"x.csv").write_text("1\n")
    campaign = Campaign.open(folder)
    release = campaign.release(version="1.2.0", date=DAY)
    document = json.loads((release/"ro-crate-metadata.json").read_text(encoding="utf-8"))
    graph = {e["@id"]: e for e in document["@graph"]}
    assert document["@context"] == "https://w3id.org/ro/crate/1.2/context" and len(graph) == len(document["@graph"])
    root = graph["./"]
    assert (root["name"], root["datePublished"], root["version"]) == ("Tiny <script>alert(1)</script> é", DAY, "1.2.0") and "below" in root["description"]
    assert root["license"] == {"@id": "https://creativecommons.org/licenses/by/4.0/"} and graph[root["identifier"]["@id"]]["value"] == "doi:10.5281/zenodo.1234567"
    assert [graph[a["@id"]]["@type"] for a in root["author"]] == ["Person", "Person", "Organization"] and root["author"][0]["@id"] == "https://orcid.org/0000-0002-1825-0097"
    described = {unquote(i) for i, e in graph.items() if e["@type"] == "File"}
    assert described == set(files(release)) - {"ro-crate-metadata.json"} and {unquote(p["@id"]) for p in root["hasPart"]} == described | {"#technique-echem", "#technique-xas"}
    for i, e in graph.items():
        if "contentSize" in e: assert int(e["contentSize"]) == (release/unquote(i)).stat().st_size
    references = re.findall(r'\{\s*"@id": ("(?:[^"\\]|\\.)*")\s*\}', (release/"ro-crate-metadata.json").read_text(encoding="utf-8"))
    assert {json.loads(r) for r in references} - set(graph) == {"https://w3id.org/ro/crate/1.2"}, "nothing is referred to that is not described"
    read = ROCrate(release)  # the reader of the rocrate library accepts it
    assert read.name == root["name"] and len(read.data_entities) == len(described)


def test_the_crate_says_method_variables_units_and_instrument(folder):
    campaign = Campaign.open(folder)
    release = campaign.release(date=DAY)
    graph = {e["@id"]: e for e in json.loads((release/"ro-crate-metadata.json").read_text(encoding="utf-8"))["@graph"]}
    xas = graph["#technique-xas"]
    assert xas["@type"] == "Dataset" and len(xas["hasPart"]) == 7 and graph[xas["about"]["@id"]]["material"] == "LiNiO2"
    assert xas["measurementTechnique"] == ["X-ray absorption spectroscopy", {"@id": "http://purl.org/pan-science/PaNET/PaNET01196"}]
    units = {graph[v["@id"]]["name"]: graph[v["@id"]].get("unitText") for v in xas["variableMeasured"]}
    stage = campaign["xas/raw"]
    assert units == {k: v.attrs.get("units") for k, v in stage.variables.items() if v.dtype.kind not in "OU"} and units["energy"] == "eV" and units["time"] == "s"
    action = graph["#release"]
    assert action["@type"] == "CreateAction" and graph[action["instrument"]["@id"]]["name"] == "batt_nb" and action["endTime"] == DAY
    assert {unquote(f["@id"]) for f in action["object"]} == {n for n in files(release) if n.startswith("raw/")} and any(f["@id"].startswith("store/xas") for f in action["result"])
    bare = campaign.release(folder.parent/"bare", date=DAY, store=False)
    graph = {e["@id"]: e for e in json.loads((bare/"ro-crate-metadata.json").read_text(encoding="utf-8"))["@graph"]}
    assert {graph[v["@id"]]["name"]: graph[v["@id"]]["unitText"] for v in graph["#technique-echem"]["variableMeasured"]} == {"time": "s", "voltage": "V", "current": "A"}


@pytest.mark.parametrize("text", [
    '[campaign]\nname = "a"\n', '[campaign] # x\r\nname = "raw_root = \'b\'"\r\nraw_root = \'/c\\d\' # e\r\n', 'campaign = { name = "a" }\n', 'campaign = { name = "a", raw_root = "b" }\n',
    '[campaign]\nname = "a"\ndescription = """\n[campaign]\nraw_root = "x"\n"""\nraw_root = "y"\n', '["campaign"]\nname = "a"\n"raw_root" = "b"\n'])
def test_raw_root_is_set_in_any_style(text):
    import tomllib
    before, after = tomllib.loads(text), tomllib.loads(with_raw_root(text, 'raw/"é'))
    assert after["campaign"].pop("raw_root") == 'raw/"é'
    before["campaign"].pop("raw_root", None)
    assert after == before


def test_a_manifest_where_raw_root_finds_no_place(): # dotted keys: said, not guessed
    with pytest.raises(BattError, match="raw_root cannot be set"): with_raw_root('campaign.name = "a"\n', "raw")


# ---- the command line, and the cost of importing

def test_the_command(folder, tmp_path):
    def run(*words): return subprocess.run([sys.executable, "-m", "batt_nb", "release", *map(str, words)], capture_output=True, text=True, check=False)
    out = run(folder, "--version", "2.1.0", "--to", tmp_path/"out", "--date", DAY)
    assert out.returncode == 0 and f"released to {tmp_path/'out'}" in out.stdout, out.stderr
    assert verify_release(tmp_path/"out") == [] and 'version: "2.1.0"' in (tmp_path/"out"/"CITATION.cff").read_text(encoding="utf-8")
    out = run(folder, "--version", "2.1", "--to", tmp_path/"more")
    assert out.returncode == 1 and "semantic version" in out.stderr and "Traceback" not in out.stderr and not (tmp_path/"more").exists()


def test_the_module_is_light_to_import():
    code = "import sys; from batt_nb.campaign import Campaign; import batt_nb.campaign.releasing; assert Campaign.release; print([m for m in ('rocrate', 'requests', 'h5py', 'psutil') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "rocrate" not in out and "requests" not in out
