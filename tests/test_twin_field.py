"""The field of a hidden cell on disk: equal to the field drawn whole, in flat memory, whole or not at all; boxes of voxels are cut from the whole."""
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest
import xarray as xr

from batt_nb.campaign.store import open_stage
from batt_nb.core import BattError
from batt_nb.twin import field, microstructure
from batt_nb.twin.cells import lithium, lithium_at, make_cell, profile
from batt_nb.twin.field import chunks_of, write_field
from batt_nb.twin.microstructure import (
    boxes,
    claim,
    count_voxels,
    from_labels,
    make_microstructure,
    rank,
)
from batt_nb.twin.xct import attenuation_volume, project, project_slabs


@pytest.fixture(scope="module")
def cells():
    """A cell of each kind of front, in a box whose sides no box divides."""
    return {name: make_cell(name, "B", seed=4, size=(30, 52, 44)) for name in ("LFP", "NMC811", "graphite")}


def times(cell): return np.array([0.03, 0.27, 0.9])*cell.duration


# -- the file equals what is drawn whole ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "side"), [("LFP", 21), ("NMC811", 16), ("NMC811", 256), ("graphite", 24)])
def test_file_is_the_field_drawn_whole(cells, name, side, tmp_path):
    cell = cells[name]
    whole = lithium(cell, times(cell))
    with open_stage(write_field(cell, tmp_path/"f.h5", times(cell), side=side, progress=False)) as ds:
        assert ds.lithium_content.dtype == "float32" and ds.labels.dtype == "uint8"
        np.testing.assert_array_equal(ds.lithium_content, whole.values.astype("float32"))
        np.testing.assert_array_equal(ds.labels, cell.micro.labels())
        np.testing.assert_array_equal(np.isfinite(ds.lithium_content[0]), ds.labels == 1)
        for d in ("time", "z", "y", "x"): np.testing.assert_array_equal(ds[d], whole[d])


@pytest.mark.parametrize("name", ["LFP", "NMC811", "graphite"])
def test_lithium_on_disk_is_that_of_the_charge(cells, name, tmp_path):
    """float32 rounds each value by up to 3e-8; summed in float64 the mean keeps far more than 1e-6."""
    cell, t = cells[name], times(cells[name])
    truth = cell.differences.x_start - np.interp(t, cell.record.time, cell.record.passed - cell.record.side)
    with open_stage(write_field(cell, tmp_path/"f.h5", t, side=16, progress=False)) as ds:
        np.testing.assert_allclose(ds.lithium_content.mean(("z", "y", "x"), dtype="float64"), truth, rtol=0, atol=3e-8)
        np.testing.assert_allclose(ds.lithium_content_cell, truth, rtol=0, atol=1e-9)


def test_units_and_names(cells, tmp_path):
    cell = cells["NMC811"]
    with open_stage(write_field(cell, tmp_path/"f.h5", 100.0, side=32, progress=False)) as ds:
        assert {d: ds[d].attrs["units"] for d in ds.coords} == {"time": "s", "z": "µm", "y": "µm", "x": "µm"}
        assert all("long_name" in v.attrs and "units" in v.attrs for v in ds.variables.values())
        assert ds.attrs == {"cell": "B", "material": "NMC811", "voxel_um": cell.micro.voxel}
        assert ds.lithium_content.dims == ("time", "z", "y", "x")


def test_nothing_is_read_before_it_is_asked_for(cells, tmp_path):
    with open_stage(write_field(cells["LFP"], tmp_path/"f.h5", 100.0, side=32, progress=False)) as ds:
        assert not ds.lithium_content.variable._in_memory and not ds.labels.variable._in_memory


def test_each_chunk_is_one_box_wide_and_compressed(cells, tmp_path):
    path = write_field(cells["NMC811"], tmp_path/"f.h5", times(cells["NMC811"]), side=24, progress=False)
    with h5py.File(path) as f:
        assert f["lithium_content"].chunks == (1, 8, 24, 24) and f["labels"].chunks == (8, 24, 24)
        for name in ("lithium_content", "labels"):
            assert "32008" in f[name]._filters # bitshuffle
            assert f[name].id.get_storage_size() < 0.8*f[name].nbytes
        assert f["entry/data"].attrs["signal"] == "lithium_content"


@pytest.mark.parametrize(("side", "layers"), [(256, 8), (36, 6), (21, 7), (13, 1), (5, 5)])
def test_chunks_divide_the_box(side, layers):
    assert chunks_of((512,)*3, side) == (layers, side, side) and side % layers == 0


def test_same_cell_same_bytes(cells, tmp_path):
    a, b = (write_field(cells["LFP"], tmp_path/n, times(cells["LFP"]), side=32, progress=False).read_bytes() for n in ("a.h5", "b.h5"))
    assert a == b


def test_a_label_volume_is_written_too(cells, tmp_path):
    source = cells["NMC811"].micro
    cell = make_cell("LFP", "C", micro=from_labels(source.labels().values, source.voxel, active=1, binder=2))
    with open_stage(write_field(cell, tmp_path/"f.h5", times(cell), side=20, progress=False)) as ds:
        np.testing.assert_array_equal(ds.lithium_content, lithium(cell, times(cell)).values.astype("float32"))
        np.testing.assert_array_equal(ds.labels, source.labels())


# -- parts, errors -------------------------------------------------------------------------------------------------------------------

def test_parts_of_several_machines_are_the_whole(cells, tmp_path):
    cell, t = cells["graphite"], times(cells["graphite"])
    with open_stage(write_field(cell, tmp_path/"all.h5", t, progress=False)) as ds: whole = ds.load()
    parts = []
    for i, z in enumerate([(0, 11), (11, 30)]):
        columns = [open_stage(write_field(cell, tmp_path/f"{i}{j}.h5", t, side=16, progress=False, z=z, x=x)).load() for j, x in enumerate([(0, 17), (17, 44)])]
        parts.append(xr.concat(columns, "x", data_vars="minimal"))
    xr.testing.assert_identical(xr.concat(parts, "z", data_vars="minimal"), whole)


@pytest.mark.parametrize(("t", "options", "says"), [
    ([], {}, "do not rise"), ([5.0, 5.0], {}, "do not rise"), ([9.0, 5.0], {}, "do not rise"), ([np.nan], {}, "do not rise"), ([1e9], {}, "record runs"),
    ([5.0], {"side": 0}, "boxes of 0"), ([5.0], {"z": (0, 31)}, "box from 0 to 31")])
def test_what_is_wrong_is_refused_before_a_file_stands(cells, t, options, says, tmp_path):
    with pytest.raises(BattError, match=says): write_field(cells["LFP"], tmp_path/"f.h5", t, progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_a_run_that_breaks_off_leaves_the_old_file(cells, tmp_path, monkeypatch):
    path = write_field(cells["LFP"], tmp_path/"f.h5", 100.0, progress=False)
    before, drawn = path.read_bytes(), []

    def broken(*args):
        drawn.append(1)
        if len(drawn) == 3: raise KeyboardInterrupt
        return lithium_at(*args)

    monkeypatch.setattr(field, "lithium_at", broken)
    with pytest.raises(KeyboardInterrupt): write_field(cells["LFP"], path, 200.0, side=16, progress=False)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["f.h5"]


# -- memory --------------------------------------------------------------------------------------------------------------------------

CHILD = """
import pickle, sys
import h5netcdf, hdf5plugin
from batt_nb.twin.field import write_field
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])/1e3
cell, edge = pickle.load(open(sys.argv[1], "rb")), (0, int(sys.argv[3]))
write_field(cell, sys.argv[2], [10.0], side=8, progress=False, z=(0, 8), y=(0, 8), x=(0, 8)) # what is loaded at first use
base = peak()
write_field(cell, sys.argv[2], [100.0, 5000.0], side=64, progress=False, z=edge, y=edge, x=edge)
print(peak() - base)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_memory_is_that_of_a_box(tmp_path):
    """Eight times the volume takes no more than 1.3 times the memory (MB) beyond the base; held as a whole it would take 19 MB for each frame and the phases."""
    cell, beyond = make_cell("NMC811", size=(128, 128, 128)), []
    assert cell.micro.counts.sum() > 0 and np.isfinite(cell.micro.binder_threshold) # known before
    (tmp_path/"cell").write_bytes(pickle.dumps(cell))
    for edge in (64, 128):
        done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path/"cell"), str(tmp_path/"f.h5"), str(edge)], capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
        beyond.append(float(done.stdout))
    print("peak beyond the base (MB):", beyond)
    assert beyond[1] <= 1.3*beyond[0], beyond


# -- boxes of voxels -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "voxel"), [("NMC811", 0.65), ("LFP", 0.025), ("graphite", 0.65), ("NMC811", 0.3)])
def test_ranks_of_a_box_are_those_of_the_whole(name, voxel):
    """Reference: one sort over the whole volume."""
    micro = make_microstructure(name, (40, 48, 56), voxel=voxel, seed=2)
    all_in_one = claim(micro)
    particle, (ranks, n) = all_in_one["particle"], rank(all_in_one["particle"], all_in_one["key"])
    np.testing.assert_array_equal(micro.counts[:n.size], n)
    for box in [{}, {"z": (7, 8)}, {"y": (0, 20), "x": (30, 56)}, {"z": (10, 33), "y": (11, 34), "x": (12, 35)}]:
        cut = tuple(slice(*box.get(d, (None,))) for d in "zyx")
        p, k = micro.ranks(**box)
        np.testing.assert_array_equal(p, particle[cut])
        np.testing.assert_array_equal(k, ranks[cut])


def test_claims_agree_whatever_else_is_wanted_and_however_they_are_cut(monkeypatch):
    micro = make_microstructure("graphite", (30, 40, 40), seed=1)
    full = claim(micro)
    for besides in ((), ("next",), ("key",)):
        one = claim(micro, besides=besides)
        assert set(one) == {"particle", "near", "coordinates", *besides}
        held = full["particle"] >= 0
        np.testing.assert_array_equal(one["particle"], full["particle"])
        np.testing.assert_array_equal(one["near"][held], full["near"][held])
        if "key" in besides: np.testing.assert_array_equal(one["key"][held], full["key"][held])
        if "next" in besides: np.testing.assert_array_equal(one["next"], full["next"])
    monkeypatch.setattr(microstructure, "PIECE", 500)
    fine = claim(micro)
    for name in ("particle", "near", "next", "key"): np.testing.assert_array_equal(fine[name], full[name])
    labels = micro.labels()
    monkeypatch.undo()
    np.testing.assert_array_equal(labels, micro.labels())


def test_counts_of_boxes_add_up():
    micro = make_microstructure("LFP", (30, 40, 50), seed=1)
    parts = list(boxes(micro.size, 17))
    np.testing.assert_array_equal(count_voxels(micro, parts[:5]) + count_voxels(micro, parts[5:]), micro.counts)
    assert micro.counts.sum() == (micro.labels() == 1).sum()


def test_lithium_at_is_the_mean_of_the_profile(cells):
    """Each particle's voxels hold its own lithium content."""
    for cell in cells.values():
        t = 0.4*cell.duration
        particle, k = cell.micro.ranks()
        x, held = lithium_at(cell, t, particle, k), particle >= 0
        np.testing.assert_array_equal(np.isfinite(x), held)
        mean = np.bincount(particle[held], x[held], cell.micro.counts.size)[cell.micro.counts > 0]/cell.micro.counts[cell.micro.counts > 0]
        np.testing.assert_allclose(mean, profile(cell, t)[0].mean(-1)[cell.micro.counts > 0], rtol=0, atol=1e-12)


# -- tomography from the file --------------------------------------------------------------------------------------------------------

def test_slabs_from_the_file_project_as_the_whole(cells, tmp_path):
    cell, t = cells["NMC811"], times(cells["NMC811"])
    whole = project(attenuation_volume(cell.micro.labels(), lithium(cell, t), "NMC811", 25.0), [0.0, 33.0, 90.0])
    with open_stage(write_field(cell, tmp_path/"f.h5", t, side=16, progress=False)) as ds:
        read = lambda a, b: attenuation_volume(ds.labels[a:b], ds.lithium_content[:, a:b], "NMC811", 25.0)
        rows = xr.concat(project_slabs(read, 30, [0.0, 33.0, 90.0], slab=7), "z").transpose(*whole.dims)
    np.testing.assert_allclose(rows, whole, rtol=0, atol=1e-6*float(whole.max()))
