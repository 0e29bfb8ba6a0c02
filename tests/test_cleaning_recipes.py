"""Recipes: what they may say, what they override, what is refused, and the pages that tell it."""
import json
import shutil

import numpy as np
import pytest
import tifffile
import xarray as xr

from batt_nb.campaign import Campaign
from batt_nb.cleaning.recipes import CHAINS, PARTS, check_recipe, clean, clean_technique, outside
from batt_nb.core import BattError, flags, history
from batt_nb.report import pages, report
from conftest import DATA, ROOT, needs_data

SAMPLE = ROOT/"data_samples"/"lfp-twin"


def log(ds): return {e["part"]: e for e in json.loads(ds.attrs["recipe_log"])}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")/"lfp"
    shutil.copytree(SAMPLE, folder, ignore=shutil.ignore_patterns("store", "reports", "campaign.h5"))
    return Campaign.open(folder).ingest(["xas_control", "xrd_control", "xct"], progress=False)


@pytest.fixture(scope="module")
def spectra(campaign): return campaign["xas_control/raw"].load().isel(time=slice(0, 12))


def small_images(n=5, seed=0):
    r = np.random.default_rng(seed)
    from scipy.ndimage import gaussian_filter, shift
    base = gaussian_filter(r.normal(size=(80, 80)), 3)
    base = 100*(base > 0) + 20
    move = np.array([[0, 0], [0.8, -0.4], [1.6, 1.1], [-1.2, 0.5], [2.0, -1.5]])[:n]
    values = np.stack([shift(gaussian_filter(base.astype(float), 1), m, order=3, mode="nearest") for m in move])[:, 8:72, 8:72] + r.normal(0, 2, (n, 64, 64))
    at = {d: (d, np.arange(64)*0.5, {"units": "µm"}) for d in "yx"}
    return xr.Dataset({"image": (("time", "y", "x"), values, {"units": "1", "long_name": "Grey value"})}, {"time": ("time", np.arange(n)*60.0, {"units": "s"}), **at}), base[8:72, 8:72] > 50, move


def test_every_part_of_a_chain_exists():
    assert {p for chain in CHAINS.values() for p in chain} == set(PARTS)
    for chain, parts in CHAINS.items():
        assert check_recipe(dict.fromkeys(parts, True), chain) == dict.fromkeys(parts, {})


@pytest.mark.parametrize("recipe, words", [({"denoize": False}, "did you mean denoise"), ({"despike": {"thresold": 4}}, "despike.thresold"), ({"despike": "on"}, "a table of parameters"), ({"register": {}}, "no part")])
def test_unknown_words_are_refused_before_anything_runs(recipe, words):
    with pytest.raises(BattError, match=words): check_recipe(recipe, "xrd", "techniques.xrd.recipe")


def test_parts_can_be_left_out_and_given_parameters(spectra):
    before = spectra.copy(deep=True)
    done = clean(spectra, recipe={"denoise": {"method": "wavelet"}, "remove_glitches": False, "normalize_xas": {"pre": [-90, -25], "order": 1}}, progress=False)
    xr.testing.assert_identical(spectra, before)
    steps = {h["function"].split(".")[-1]: h["parameters"] for h in history(done)}
    assert steps["denoise"]["method"] == "wavelet" and steps["normalize_xas"]["pre"] == [-90, -25] and steps["normalize_xas"]["order"] == 1 and "remove_glitches" not in steps
    assert (log(done)["remove_glitches"]["done"], log(done)["denoise"]["by"], log(done)["despike"]["by"]) == (False, "recipe", "default")
    assert done.norm.dims == ("time", "energy") and done.sizes["shown"] == 12 and float(done.quality_after.sel(score="noise_sigma").mean()) < float(done.quality_before.sel(score="noise_sigma").mean())


def test_spectra_normalized_elsewhere_keep_their_readings(spectra):
    norm = clean(spectra, recipe={"denoise": False}, progress=False)[["norm"]].drop_vars(["energy_shift", "energy_shift_sigma"]).assign(i0=spectra["i0"].drop_vars("energy"))
    done = clean(norm.drop_attrs(deep=False), recipe={"denoise": False, "despike": False}, progress=False)
    assert "normalized before" in log(done)["remove_glitches"]["why"] and np.array_equal(done.norm.values, norm.norm.values, equal_nan=True)
    assert np.isfinite(done.edge_position).all()


def test_a_part_asked_for_that_cannot_be_done_is_an_error_and_a_default_one_a_remark(spectra):
    lame = spectra.copy(deep=True)
    lame["foil"][:] = 1.0
    done = clean(lame, progress=False)
    assert log(done)["align_energy"]["failed"] and not log(done)["align_energy"]["done"] and any("align_energy could not be done" in f for f in flags(done))
    with pytest.raises(BattError, match="recipe.align_energy"): clean(lame, recipe={"align_energy": True}, progress=False)


def test_spectra_without_an_edge_are_masked_and_counted(spectra):
    spoiled = spectra.copy(deep=True)
    spoiled["mu"][3] = 0.5 + 1e-4*np.random.default_rng(0).normal(size=spectra.sizes["energy"])
    done = clean(spoiled, recipe={"denoise": False}, progress=False)
    assert np.isnan(done.norm[3]).all() and np.isfinite(done.norm[2]).any() and "1 spectrum of 12 without a significant edge masked" in log(done)["normalize_xas"]["why"]
    assert np.isnan(done.edge_position[3])


def test_references_by_frames_and_by_files(spectra, tmp_path):
    done = clean(spectra, recipe={"fit_references": {"references": {"first": [0], "last": [11]}}, "denoise": False}, progress=False)
    assert float(done.weight.sel(reference="first")[0]) == pytest.approx(1, abs=0.02) and float(done.weight.sel(reference="last")[11]) == pytest.approx(1, abs=0.02)
    with pytest.raises(BattError, match="names files"): clean(spectra, recipe={"fit_references": {"references": {"a": "*.xdi"}}}, progress=False)
    with pytest.raises(BattError, match="frame 40 of 12"): clean(spectra, recipe={"fit_references": {"references": {"a": [40]}}}, progress=False)


def test_images_are_moved_into_place_once_and_strokes_with_them(tmp_path, one_thread):
    ds, truth, move = small_images()
    marks = np.full((64, 64), 255, np.uint8)
    marks[::6] = np.where(np.roll(truth, (2, -2), (0, 1)), 1, 0)[::6] # painted on the last frame as it came, which lies 2 px down and 1.5 to the left
    tifffile.imwrite(tmp_path/"4_label.tif", marks)
    recipe = {"segment": {"classes": {"low": 0, "high": 1}, "labels": "*_label.tif", "network": "forest", "teacher": None}, "correct_intensity": False, "denoise": False}
    done = clean(ds, recipe=recipe, files=lambda pattern: sorted(tmp_path.glob(pattern)), progress=False)
    assert np.abs(done["drift"].values - move).max() < 0.1
    assert sum(h["function"].endswith("apply_shift") for h in history(done)) == 1
    inner = np.s_[6:-6, 6:-6]
    assert (done.label.values[0][inner] == truth[inner]).mean() > 0.93
    wrong = clean(ds, recipe=recipe | {"segment": recipe["segment"] | {"painted": "clean"}}, files=lambda pattern: sorted(tmp_path.glob(pattern)), progress=False)
    assert (wrong.label.values[0][inner] == truth[inner]).mean() < (done.label.values[0][inner] == truth[inner]).mean()
    assert (done.volume_fraction_lower <= done.volume_fraction).all() and (done.volume_fraction <= done.volume_fraction_upper).all()
    with pytest.raises(BattError, match="number of their frame"): clean(ds, recipe={"segment": {"classes": {"a": 0, "b": 1}, "labels": "x"}}, files=lambda p: [_copy(tmp_path/"4_label.tif", tmp_path/"nine_9.tif")], progress=False)


def _copy(a, b): shutil.copy(a, b); return b


def test_strokes_on_a_frame_that_is_not_registered_are_left_out(tmp_path, one_thread):
    ds, truth, move = small_images()
    values = ds.image.values.copy()
    values[3] = np.random.default_rng(9).normal(60, 30, (64, 64))
    marks = np.full((64, 64), 255, np.uint8)
    marks[::6] = truth[::6]
    for k, m in ((0, marks), (3, np.where(marks < 255, 1 - marks, 255).astype(np.uint8))): tifffile.imwrite(tmp_path/f"{k}_label.tif", m) # those on the lost frame say the contrary
    recipe = {"segment": {"classes": {"low": 0, "high": 1}, "labels": "*_label.tif", "network": "forest"}, "correct_intensity": False, "denoise": False, "remove_rings": False}
    run = lambda pattern: clean(ds.assign(image=ds.image.copy(data=values)), recipe=recipe, files=lambda _: sorted(tmp_path.glob(pattern)), progress=False)
    done = run("*_label.tif")
    assert done["registered"].values.tolist() == [True, True, True, False, True] and "could not be registered: 3_label.tif" in log(done)["segment"]["why"]
    assert (done.label.values[0][8:-8, 8:-8] == truth[8:-8, 8:-8]).mean() > 0.93 and (done.label.values[3] == -1).all() and np.isnan(done.volume_fraction[3]).all()
    with pytest.raises(BattError, match="no frame with strokes could be registered"): run("3_label.tif")


def test_corners_of_a_reconstruction_are_no_phase(tmp_path, one_thread):
    ds, truth, move = small_images()
    far = np.hypot(*np.mgrid[-31.5:32, -31.5:32]) > 32
    values = np.where(far, 7.0, ds.image.values)
    marks = np.full((64, 64), 255, np.uint8)
    marks[::5] = np.where(far, 255, truth)[::5]
    tifffile.imwrite(tmp_path/"0_label.tif", marks)
    recipe = {"segment": {"classes": {"low": 0, "high": 1}, "labels": "*_label.tif", "network": "forest"}, "correct_intensity": False, "denoise": False, "remove_rings": False}
    done = clean(ds.assign(image=ds.image.copy(data=values)), recipe=recipe, files=lambda pattern: sorted(tmp_path.glob(pattern)), progress=False)
    assert (done.label.values[0][far] == -1).all() and "no phase" in log(done)["segment"]["why"] and (done.label.values[0][20:44, 20:44] >= 0).all()
    a, b, c, d = done.attrs["fraction_box"]
    assert 25 < b - a < 50 and 25 < d - c < 50 and (done.label.values[:, a:b, c:d] >= 0).all()
    assert float(done.volume_fraction.sel(phase="high")[0]) == pytest.approx(truth[a:b, c:d].mean(), abs=0.05)
    assert not outside(ds.image).any() and outside(ds.image.copy(data=values))[far].all() # nothing is cut off where there is no circle


def test_scores_that_cannot_be_made_say_why():
    ds, _, _ = small_images()
    done = clean(ds.isel(y=slice(0, 12)), recipe={"register": False, "correct_intensity": False, "denoise": False}, progress=False)
    assert "quality_after" not in done and any(f.startswith("no scores of quality: images of") for f in flags(done))


def test_still_images_are_not_interpolated():
    ds, _, _ = small_images()
    r = np.random.default_rng(3)
    still = ds.assign(image=ds.image.copy(data=ds.image.values[:1] + r.normal(0, 2, ds.image.shape)))
    done = clean(still, progress=False, recipe={"denoise": False, "remove_rings": False, "correct_intensity": False})
    assert "nothing is interpolated" in log(done)["apply_shift"]["why"] and np.array_equal(done.image.values, still.image.values)


def test_the_stage_is_kept_until_the_recipe_changes(campaign):
    clean_technique(campaign, "xrd_control", progress=False)
    first = campaign.store.stages()["xrd_control", "clean"]
    made = first.stat().st_mtime_ns
    clean_technique(campaign, "xrd_control", progress=False)
    assert campaign.store.stages()["xrd_control", "clean"].stat().st_mtime_ns == made
    text = (campaign.folder/"campaign.toml").read_text()
    (campaign.folder/"campaign.toml").write_text(text + "\n[techniques.xrd_control.recipe]\nbaseline = false\n")
    other = Campaign.open(campaign.folder)
    done = clean_technique(other, "xrd_control", progress=False)
    (campaign.folder/"campaign.toml").write_text(text)
    assert "baseline" not in done and not first.exists() and other.stage_hash("xrd_control") == campaign.stage_hash("xrd_control") # the raw stage is not read anew
    assert campaign["xrd_control/raw"].sizes["time"] == campaign["xrd_control/clean"].sizes["time"]


def test_a_stage_older_than_the_raw_one_says_so(campaign):
    import os
    clean_technique(campaign, "xas_control", progress=False)
    assert not any("read anew" in f for f in flags(campaign["xas_control/clean"]))
    raw = campaign.store.stages()["xas_control", "raw"]
    before = raw.stat()
    os.utime(raw)
    assert any("read anew" in f for f in flags(campaign["xas_control/clean"])) and not flags(campaign["xas_control/raw"])
    os.utime(raw, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_page_says_what_was_done_and_shows_no_markup(campaign):
    text = (campaign.folder/"campaign.toml").read_text()
    (campaign.folder/"campaign.toml").write_text(text.replace('"active material" = 1', '"<img src=x onerror=alert(1)>" = 1'))
    index = report(Campaign.open(campaign.folder), templates=["64_cleaning_xct"], techniques="xct")
    (campaign.folder/"campaign.toml").write_text(text)
    assert {p["page"]: p["status"] for p in pages(index)} == {"cleaning_xct": "made"}, pages(index)
    page = (index.parent/"cleaning_xct.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and "&lt;img src=x" in page
    for words in ("Before, clean, taken off", "What was done, and why", "Quality before and after", "Drift", "Segmentation", "cleaning.registration.register", "campaign.toml: classes"): assert words in page
    assert "http" not in "".join(p.split(">")[0] for p in page.split("<script")[1:])


def test_a_wrong_recipe_fails_its_page_alone(campaign):
    text = (campaign.folder/"campaign.toml").read_text()
    (campaign.folder/"campaign.toml").write_text(text + "\n[techniques.xas_control.recipe]\ndenoise = { methud = \"tv\" }\n")
    index = report(Campaign.open(campaign.folder), templates=["60_cleaning_xas", "62_cleaning_xrd"], techniques=["xas_control", "xrd_control"])
    (campaign.folder/"campaign.toml").write_text(text)
    made = {p["page"]: p for p in pages(index)}
    assert made["cleaning_xas_control"]["status"] == "failed" and "techniques.xas_control.recipe.denoise" in made["cleaning_xas_control"]["error"] and made["cleaning_xrd_control"]["status"] == "made"


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name, technique", [("lno-operando-xas", "xas"), ("nmc622-operando-nmr", "nmr"), ("coincell-operando-xrd", "xrd")])
def test_measured_campaigns_are_cleaned(name, technique, tmp_path):
    shutil.copy(ROOT/"tests"/"campaigns"/name/"campaign.toml", tmp_path)
    campaign = Campaign.open(tmp_path, raw_root=DATA/"campaigns"/name)
    done = clean_technique(campaign, technique, progress=False)
    assert not any(e.get("failed") for e in log(done).values()) and np.isfinite(done[done.attrs["main"]]).mean() > 0.9
    if technique == "xas": assert "aligned already" in log(done)["align_energy"]["why"]
