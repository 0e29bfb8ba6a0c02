"""The sample campaigns: whole, small, what they say of themselves, and made again by the command that they name."""
import hashlib
import re
import shlex

import numpy as np
import pytest

from batt_nb.campaign import Campaign
from batt_nb.campaign.manifest import load_manifest
from batt_nb.campaign.sources import resolve
from conftest import ROOT

SAMPLES = sorted(p.parent for p in (ROOT/"data_samples").glob("*/campaign.toml"))
BY_NAME = pytest.mark.parametrize("sample", SAMPLES, ids=lambda p: p.name)


def listed(folder):
    """File name -> sha256, as checksums.sha256 lists them."""
    return {name: digest for digest, name in (line.split("  ", 1) for line in (folder/"checksums.sha256").read_text(encoding="utf-8").splitlines())}


def files(folder):
    """What belongs to the campaign, not what was made from it."""
    return {p.relative_to(folder).as_posix() for part in ("raw", "truth") for p in (folder/part).rglob("*") if p.is_file()} | {"campaign.toml"}


def command(sample):
    """What the first line of the manifest says made it."""
    words = shlex.split(re.search(r"batt-nb twin (.*)", (sample/"campaign.toml").read_text(encoding="utf-8").splitlines()[0])[1])
    return words[0], dict(zip((w.removeprefix("--") for w in words[1::2]), words[2::2], strict=True))


def test_there_is_one_of_each_material():
    assert [p.name for p in SAMPLES] == ["graphite-twin", "lfp-twin", "nmc811-twin"]


@BY_NAME
def test_files_match_their_checksums_and_are_small(sample):
    sums = listed(sample)
    assert files(sample) == set(sums)
    for name, digest in sums.items(): assert hashlib.sha256((sample/name).read_bytes()).hexdigest() == digest, name
    assert sum((sample/n).stat().st_size for n in sums) < 8e6


@BY_NAME
def test_manifest_names_every_raw_file(sample):
    manifest = load_manifest(sample)
    patterns = [f for t in manifest.techniques.values() for f in (*t.files, *([t.clock.table] if t.clock.table else []), *([t.recipe["segment"]["labels"]] if "segment" in t.recipe else []))]
    found = [p for s in resolve(patterns, sample) for p in (s.path.rglob("*") if s.path.is_dir() else [s.path])]
    assert {p.resolve() for p in found if p.is_file()} == {p.resolve() for p in (sample/"raw").rglob("*") if p.is_file()}


@BY_NAME
def test_readme_tells_the_command_that_the_manifest_names(sample):
    _, options = command(sample)
    text = (ROOT/"data_samples"/"README.md").read_text(encoding="utf-8")
    assert re.search(rf"batt-nb twin data_samples/{sample.name} +--material {options['material']} +--size {options['size']} --seed {options['seed']}\n", text)


@pytest.mark.slow
@BY_NAME
def test_made_again_it_is_the_same(sample, tmp_path):
    from batt_nb.twin import make_twin
    _, o = command(sample)
    make_twin(tmp_path/"again", o["material"], o["size"], seed=int(o["seed"]), protocol=o["protocol"], rate=float(o["rate"]), cycles=int(o["cycles"]), strength=float(o["strength"]), progress=False)
    assert files(tmp_path/"again") == files(sample)
    old, new = (Campaign.open(p).store.stages() for p in (sample, tmp_path/"again"))
    truths = [key for room, key in old if room == "truth"]
    assert truths and {key for room, key in new if room == "truth"} == set(truths)
    for key in truths: # to rounding; the same bytes where versions and machine are the same
        a, b = (Campaign.open(p)[f"truth/{key}"].load() for p in (sample, tmp_path/"again"))
        for name in a.data_vars:
            if a[name].dtype.kind in "fc": np.testing.assert_allclose(b[name].values, a[name].values, rtol=1e-3, atol=1e-3*float(np.nanmax(np.abs(a[name].values), initial=0)), err_msg=f"{key} {name}")
