"""Every cleaner on data that need no cleaning: it changes them by no more than it says, and fronts, lines and edges stay. The cases stand in nbs/cleaning/01_nothing_invented.ipynb."""
import json

import numpy as np
import pytest

from batt_nb import cleaning
from conftest import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
rms = lambda a: float(np.sqrt(np.mean(np.square(np.asarray(a, float)))))


def scenes():
    "What the notebook defines before its table."
    cells, space = json.loads((ROOT/"nbs/cleaning/01_nothing_invented.ipynb").read_text(encoding="utf-8"))["cells"], {}
    for cell in cells:
        source = "".join(cell["source"])
        if source.startswith("## What they do and what they say"): return space
        if cell["cell_type"] == "code": exec(compile(source, "01_nothing_invented.ipynb", "exec"), space)
    raise AssertionError("the notebook has lost the heading of its table")


ROOM = scenes()
CASES, LIMIT = ROOM["CASES"], ROOM["LIMIT"]
HOMES = {"frames", "stripes", "tomography", "scan_geometry", "noise", "blur", "signals", "nmr_processing", "xas_energy", "xas_corrections", "diffraction", "registration"} # of cleaners
NO_CLEANERS = {"find_stripes", "reconstruct", "write_slices", "find_center", "estimate_blur", "dose_check", "edge_measure", "lithium_from_edge", "integrate", "parasitic_peaks",
               "transform", "integrals", "normalize_to"} # they measure or transform, and take nothing off
INSIDE = {"find_leakage", "apply_shift"} # run inside of another's case


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if slow else []) for n, (*_, slow) in CASES.items()])
def test_no_more_than_stated(name):
    f, statement, _ = CASES[name]
    change, stated, moved = f()
    if stated is not None: assert np.isfinite(stated) and change <= LIMIT[statement]*stated*(1 + 1e-6)
    if moved is not None: assert np.abs(moved).max() < 0.5


def test_every_cleaner_has_a_case():
    told, ours = " ".join(CASES), [n for n in cleaning.__all__ if getattr(getattr(cleaning, n), "__module__", "").rpartition(".")[2] in HOMES]
    missing = [n for n in ours if n not in NO_CLEANERS | INSIDE and n not in told]
    assert len(ours) > 20
    assert not missing, f"no case for {missing}: add a cell to nbs/cleaning/01_nothing_invented.ipynb"


def test_a_front_that_is_dragged_and_a_line_that_is_cut_are_seen():
    line, true = ROOM["patterns"](True), ROOM["patterns"](False)
    late = line.copy(data=np.concatenate([line.values[:1], (line.values[:-1] + line.values[1:])/2]))
    assert np.abs(ROOM["line_moved"](line)).max() < 0.2 < 0.5 < np.abs(ROOM["line_moved"](late.shift(two_theta=1))).max()
    held = ROOM["front"](True).rolling(time=3, min_periods=1).mean()
    assert np.abs(ROOM["front_moved"](held)).max() >= 0.5
    assert ROOM["displacement"](np.roll(true.values[:, 80:220], 1, 1), true.values[:, 80:220]) == pytest.approx(1, abs=0.051)


def test_equal_pixels_around_a_disk_stay_whole():
    "Where patches are equal to the last bit (outside of a reconstructed disk), each is still among those like it."
    from batt_nb.cleaning.noise import denoise
    image = ROOM["tomogram"]()[0]
    out = denoise(image, method="patches")
    assert np.isfinite(out.values).all() and np.isfinite(out.estimated_error) and rms(out.values[:12, :12]) < 1e-3*rms(image)


def test_the_expected_error_is_that_in_the_units_of_the_data():
    "Lines of a thousand counts on a background of ten: most of the error stands in few channels."
    from batt_nb.cleaning.noise import denoise
    for method in ("wavelet", "tv", "lowrank"):
        out = denoise(ROOM["patterns"](True), method=method)
        assert 0.85 < rms(out - ROOM["patterns"](False))/out.estimated_error < 1.2


def test_cases_do_not_touch_their_data():
    before = {n: ROOM[n](True).copy(deep=True) for n in ("front", "patterns")} | {"mu": ROOM["spectra"](True).mu.copy(deep=True)}
    for n in ("correct_intensity", "remove_rings", "despike pattern", "mask_peaks", "correct_leakage", "remove_glitches"): CASES[n][0]()
    assert before["front"].identical(ROOM["front"](True)) and before["patterns"].identical(ROOM["patterns"](True)) and before["mu"].identical(ROOM["spectra"](True).mu)
