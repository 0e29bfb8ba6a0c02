"""The three measured campaigns through the whole path, against the reference values."""
import shutil
from pathlib import Path

import numpy as np
import pytest

from batt_nb.campaign import Campaign
from batt_nb.core import absolute_time, flags
from conftest import DATA, ROOT, needs_data, oracle

pytestmark = needs_data


def opened(name, folder):
    """A campaign's manifest in a folder of its own, its raw files where they are."""
    shutil.copy(ROOT/"tests"/"campaigns"/name/"campaign.toml", folder)
    return Campaign.open(folder, raw_root=DATA/"campaigns"/name).ingest(progress=False)


@pytest.fixture(scope="module")
def lno(tmp_path_factory): return opened("lno-operando-xas", tmp_path_factory.mktemp("lno"))

@pytest.fixture(scope="module")
def coincell(tmp_path_factory): return opened("coincell-operando-xrd", tmp_path_factory.mktemp("coincell"))

@pytest.fixture(scope="module")
def nmc622(tmp_path_factory): return opened("nmc622-operando-nmr", tmp_path_factory.mktemp("nmc622"))


def test_the_kept_manifests_point_to_the_data():
    for folder in sorted((ROOT/"tests"/"campaigns").iterdir()):
        campaign = Campaign.open(folder)
        assert all(campaign.sources(t) for t in campaign.techniques)


def test_lno_edge_and_voltage_of_every_sampled_spectrum(lno):
    from batt_nb.campaign.absorption import edge_position
    reference = oracle("operando_alignment")["result"]
    joined = lno.joined("xas")
    edge = edge_position(joined.norm, level=0.5, window=(8330, 8360))
    edge = edge.edge if hasattr(edge, "data_vars") else edge
    assert joined.sizes["time"] == reference["n_spectra"] == 229 and joined.sizes["energy"] == reference["n_energies"]
    stamps = absolute_time(joined)
    assert (np.diff(stamps) > np.timedelta64(0)).all()
    for sample in reference["samples"]:
        i = sample["index_in_time_order"]
        assert Path(str(joined.source.values[i])).name.endswith(sample["file"])
        assert abs(stamps[i] - np.datetime64(sample["start"].replace(" ", "T"))) <= np.timedelta64(1, "ms")
        assert float(joined.voltage_at_start[i]) == pytest.approx(sample["voltage_V"], abs=2e-6)
        assert float(edge[i]) == pytest.approx(sample["edge_eV_at_mu_0.5"], abs=1e-3)
    assert float(edge.mean()) == pytest.approx(reference["edge_min_max_mean_eV"][2], abs=1e-3)
    r = np.corrcoef(edge, joined.voltage_at_start)[0, 1]
    assert r == pytest.approx(reference["pearson_edge_voltage_all"], abs=1e-5)


def test_lno_exposure_average_lies_between_start_and_end(lno):
    joined = lno.joined("xas")
    assert float(joined.exposure.median()) == pytest.approx(130, abs=2)
    mid = joined.voltage - joined.voltage_at_start
    assert float(abs(mid).max()) < 0.1 and float(abs(mid).median()) > 1e-5


def test_lno_header_mass_is_refused_and_no_lithium_content_invented(lno):
    state = lno.state("cell4")
    assert "lithium_content" not in state
    assert any("7000" in f and "mg" in f for f in flags(state)), flags(state)
    first, second = (oracle("echem")["files"][f"campaigns/lno-operando-xas/raw/echem/220726cell4operandoxas{n}_C06.mpt"]["(Q-Qo)/mA.h"] for n in ("", "continuation"))
    assert float(state.capacity.max()*1e3) == pytest.approx(first["last"] + second["max"], abs=1e-4)


def test_lno_half_cycles_are_told_apart(lno):
    state = lno.state("cell4")
    halves = [int(h) for h in np.unique(state.half_cycle.values) if h >= 0]
    assert halves == list(range(9)), halves # 0: before any current; 8: the first minutes of the last discharge


def test_coincell_voltages_at_the_scans_and_the_first_is_missing(coincell):
    joined = coincell.joined("xrd")
    scans = [v for k, v in oracle("xrd")["files"].items() if "coincell8" in k][0]["scans"]
    assert joined.sizes["time"] == len(scans) == 5
    for i, scan in enumerate(scans):
        assert str(scan["scan"]) in str(joined.source.values[i])
        assert float(joined.exposure[i]) == pytest.approx(scan["duration_s"], abs=2e-3)
        at_start, mean = float(joined.voltage_at_start[i]), float(joined.voltage[i])
        if scan["voltage_at_start_V"] is None: assert np.isnan(at_start) and np.isnan(mean)
        else:
            assert at_start == pytest.approx(scan["voltage_at_start_V"], abs=2e-4)
            lo, hi = sorted((scan["voltage_at_start_V"], scan["voltage_at_end_V"]))
            assert lo - 2e-3 <= mean <= hi + 2e-3
    assert "wavelength" not in joined.attrs


def test_nmc622_profiles_inside_the_curve_and_masked_after_it(nmc622):
    reference = oracle("nmr")["operando_mri"]
    joined = nmc622.joined("nmr")
    assert joined.sizes["time"] == reference["n_profiles"]
    known = np.isfinite(joined.voltage_at_start)
    assert int(known.sum()) == reference["alignment"]["n_profiles_inside_POL_span"]
    assert bool(known[:52].all()) and not bool(known[52:].any())
    assert float(joined.voltage_at_start[0]) == pytest.approx(reference["alignment"]["voltage_at_those_times"][0], abs=1e-5)
    said = " ".join(flags(joined))
    assert "6" in said and "inferred" in said
