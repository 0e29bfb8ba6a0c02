"""The command line as a user meets it: in a process of its own."""
import subprocess
import sys

import pytest

from test_campaign import folder  # noqa: F401  the tiny campaign


def batt_nb(*words):
    return subprocess.run([sys.executable, "-m", "batt_nb", *map(str, words)], capture_output=True, text=True, check=False)


def test_help_is_quick_and_names_every_command():
    out = batt_nb("--help")
    assert out.returncode == 0
    for command in ("init", "ingest", "report", "export", "cite", "formats", "lab", "doctor"): assert command in out.stdout


def test_init_ingest_export_cite(folder, tmp_path):  # noqa: F811
    (folder/"campaign.toml").unlink()
    assert "drafted" in batt_nb("init", folder).stdout
    manifest = folder/"campaign.toml"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('cell = "cell1"\nfiles = ["raw/cell.csv"]', 'cell = "cell1"\nfiles = ["raw/cell.csv"]\nclock = { start = "2026-03-01T10:00:00" }'), encoding="utf-8")
    out = batt_nb("ingest", folder)
    assert out.returncode == 0 and "xas: {'time': 6" in out.stdout, out.stderr
    out = batt_nb("export", folder, "--to", tmp_path/"out")
    assert out.returncode == 0 and len(list((tmp_path/"out"/"xas").glob("*.xdi"))) == 6, out.stderr
    assert "batt_nb" in batt_nb("cite", folder).stdout


@pytest.mark.parametrize("command", ["ingest", "report", "export", "cite"])
def test_an_error_is_one_line_with_a_mend(command, tmp_path):
    out = batt_nb(command, tmp_path)
    assert out.returncode == 1 and "there is no campaign.toml" in out.stderr and "batt-nb init" in out.stderr and "Traceback" not in out.stderr


def test_formats_lists_every_technique():
    out = batt_nb("formats").stdout
    for word in ("echem", "xas", "xrd", "xct", "nmr", "BioLogic", "XDI", "Bruker", "TIFF"): assert word in out
