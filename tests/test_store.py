"""The store under faults: a full disk, no permission, a kill, two runs at once, damaged and vanished files."""
import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from batt_nb.campaign.store import Store, chunk_shape, open_index, open_stage, write_index, write_stage
from batt_nb.core import BattError, label


def frames(n=4, seed=0):
    """Random detector frames, which do not compress."""
    image = np.random.default_rng(seed).integers(0, 2**16, (n, 256, 256), dtype=np.uint16)
    return label(xr.Dataset({"image": (("time", "y", "x"), image)}, {"time": np.arange(n)*10.0}, {"technique": "xct"}))


def test_round_trip_of_every_kind_of_variable(tmp_path):
    ds = label(xr.Dataset({
        "signal": (("time", "acquisition_time"), np.ones((2, 3)) + 2j), "cycle": ("time", np.array([1, 2], "int32")), "mask": ("time", [True, False]),
        "name": ("time", ["<b>ä</b>", "o'ne \"two\""]), "scalar": 3.5, "empty": ("nothing", np.zeros(0))},
        {"time": [0.0, np.nan], "acquisition_time": [0.0, 1e-6, 2e-6], "start": ("acquisition_time", [5.0, 6.0, 7.0])}, {"technique": "nmr", "n": 3, "title": "µ <script>"}))
    back = open_stage(write_stage(ds, tmp_path/"nmr.raw.1.h5")).load()
    np.testing.assert_array_equal(back.signal, ds.signal)
    assert list(back.name.values) == list(ds.name.values) and back.attrs == ds.attrs
    xr.testing.assert_identical(back.drop_attrs(), ds.assign(mask=ds["mask"].astype("uint8")).drop_attrs())
    assert float(back.scalar) == 3.5 and back.sizes["nothing"] == 0 and list(back["mask"].values) == [1, 0]


def test_silx_opens_the_default_plot_of_a_stage_and_of_the_index(tmp_path):
    from silx.io import nxdata, open as silx_open
    store = Store(tmp_path)
    write_stage(frames(), store.path("xct", "raw", "1"))
    write_index(tmp_path, store.stages())
    for path in (store.path("xct", "raw", "1"), tmp_path/"campaign.h5"):
        with silx_open(str(path)) as f:
            plot = nxdata.get_default(f)
            assert plot is not None and plot.is_valid and plot.signal.shape == (4, 256, 256)
            assert plot.signal[3, 5, 7] == frames().image[3, 5, 7]


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """A limit on the size of files stops the write where a full disk would."""
    code = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_store import frames
        from batt_nb.campaign.store import Store, write_stage
        from batt_nb.core import BattError
        store = Store({str(tmp_path)!r})
        write_stage(frames(1), store.path("xas", "raw", "old"))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        try: write_stage(frames(20), store.path("xct", "raw", "new"))
        except BattError as e: print("refused:", e)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert "refused: the disk is full; nothing was left half-written" in out.stdout, out.stdout + out.stderr
    assert [p.name for p in (tmp_path/"store").iterdir()] == ["xas.raw.old.h5"]
    assert open_stage(tmp_path/"store"/"xas.raw.old.h5").load().sizes["time"] == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small file system")
def test_a_really_full_file_system(tmp_path):
    disk = tmp_path/"disk"; disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode: pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(BattError, match="the disk is full"): write_stage(frames(20), Store(disk).path("xct", "raw", "1"))
        assert list((disk/"store").iterdir()) == []
    finally: subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_kill_in_a_write_leaves_the_store_open_and_the_next_run_resumes(tmp_path):
    code = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import dask.array as da, numpy as np
        from test_store import frames
        from batt_nb.campaign.store import Store, write_stage
        store = Store({str(tmp_path)!r})
        with store.lock():
            write_stage(frames(1), store.path("xas", "raw", "done"))
            def slow(block): print("writing", flush=True); time.sleep(0.5); return block
            ds = frames(40).chunk(time=1)
            ds["image"].data = ds.image.data.map_blocks(slow, dtype="uint16", meta=np.zeros((0, 0, 0), "uint16"))
            write_stage(ds, store.path("xct", "raw", "half"))
    """
    p = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert "writing" in p.stdout.readline()
    with pytest.raises(BattError, match="another run is working"), Store(tmp_path).lock(): pass
    p.send_signal(signal.SIGKILL); p.wait()
    store = Store(tmp_path)
    assert list(store.stages()) == [("xas", "raw")]
    with store.lock():
        store.sweep()
        write_stage(frames(2), store.path("xct", "raw", "whole"))
        write_index(tmp_path, store.stages())
    assert not [f for f in (tmp_path/"store").iterdir() if f.suffix == ".part"]
    with open_index(tmp_path) as tree: assert tree["xct/raw/image"].shape == (2, 256, 256)


def test_no_permission_is_said(tmp_path, monkeypatch):
    if os.getuid() == 0:
        def refuse(*a, **k): raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))
        monkeypatch.setattr(Path, "mkdir", refuse)
    else: tmp_path.chmod(0o500)
    with pytest.raises(BattError, match="cannot be written to.*write permission"): write_stage(frames(1), tmp_path/"store"/"xct.raw.1.h5")


def test_damaged_and_vanished_stages_say_how_to_make_them_again(tmp_path):
    path = write_stage(frames(), tmp_path/"xct.raw.1.h5")
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole)//2])
    with pytest.raises(BattError, match="cannot be opened.*made again from the raw files"): open_stage(path)
    path.unlink()
    with pytest.raises(BattError, match="vanished"): open_stage(path)


def test_one_frame_a_chunk_and_memory_of_one_block(tmp_path):
    import h5py
    path = write_stage(frames(6).chunk(time=2), tmp_path/"xct.raw.1.h5")
    with h5py.File(path) as f:
        assert f["image"].chunks == chunk_shape((6, 256, 256), 2) and len(f["image"]._filters) == 1
