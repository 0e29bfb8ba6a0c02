"""Image readers against the reference values, against broken files, and within little memory."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from batt_nb.campaign.imaging import READER, combine_images, read_h5
from batt_nb.campaign.stacks import EAGER, read_picture, read_tiff
from batt_nb.campaign.zeiss import read_zeiss
from batt_nb.core import BattError, flags
from conftest import DATA, needs_data, oracle
from PIL import Image

TXM = "xas/txm-nca/rep01_{}20161456_ssrl-test-data_{:07.1f}_eV_001of{:03d}.xrm"


def read(path, **hints):
    """As the dispatcher does: the one format that fits the content."""
    with open(path, "rb") as f: head = f.read(4096)
    fits = [f for f in READER.formats if f.sniff(path, head)]
    fits = [f for f in fits if not f.generic] or fits
    assert len(fits) == 1, [f.name for f in fits]
    return fits[0].read(path, **hints)


# -- every image file, against the oracle --------------------------------------------------------------------------------------------

def xct_files():
    return sorted(oracle("xct")["files"]) if DATA.is_dir() else []


@needs_data
@pytest.mark.parametrize("name", xct_files())
def test_ct_images_and_labels(name):
    o, ds = oracle("xct")["files"][name], read(DATA/name)
    image = ds.image
    assert list(image.shape) == o["shape"] and image.dtype == o["dtype"] and image.dims[-2:] == ("y", "x")
    if o["kind"] == "label":
        values, counts = np.unique(image.values, return_counts=True)
        assert values.tolist() == o["class_values"] and counts.tolist() == o["class_counts"]
    else:
        stats = [image.values.min(), image.values.max(), image.values.mean(dtype=float), image.values.std(dtype=float)]
        assert stats == pytest.approx([o["min"], o["max"], o["mean"], o["std"]])
    assert "pixel_size_um" not in ds.attrs and "y" not in ds.coords and any("pixel size is unknown" in f for f in flags(ds))


@needs_data
def test_what_the_pages_of_a_volume_are():
    assert read(DATA/"xct/volumes/cement_128x128x128.tif").image.dims[0] == "z" # ImageJ says slices
    unsaid = read(DATA/"xct/microstructures/nmc-cbd-251x301x301.tif")
    assert unsaid.image.dims[0] == "frame" and any("does not say what its pages are" in f for f in flags(unsaid))
    assert read(DATA/"xct/microstructures/nmc-cbd-251x301x301.tif", axis="z").image.dims == ("z", "y", "x")


@needs_data
def test_sinogram():
    o, path = oracle("tomo")["files"]["sinograms/sinogram_360_neutron_image.tif"], DATA/"sinograms/sinogram_360_neutron_image.tif"
    ds = read(path, kind="sinogram", angles=[0, 360])
    p = ds.projections
    assert p.dims == ("angle", "x") and list(p.shape) == o["shape"] and p.dtype == o["dtype"]
    assert [p.values.min(), p.values.max(), p.values.mean(), p.values.std()] == pytest.approx([o["min"], o["max"], o["mean"], o["std"]])
    for s in o["remove_all_stripe"]["samples"]: assert p.values[s["row"], s["col"]] == s["before"]
    with pytest.raises(BattError, match="angles are missing"): read(path, kind="sinogram")
    assert read(path).image.dims == ("y", "x")


@needs_data
def test_tooth():
    o, ds = oracle("tomo")["files"]["sinograms/tooth.h5"], read(DATA/"sinograms/tooth.h5")
    for name, key in (("projections", "exchange/data"), ("flats", "exchange/data_white"), ("darks", "exchange/data_dark"), ("angle", "exchange/theta")):
        v = ds[name]
        assert list(v.shape) == o[key]["shape"] and v.dtype == o[key]["dtype"]
        assert [v.values.min(), v.values.max(), v.values.mean(dtype=float)] == pytest.approx([o[key]["min"], o[key]["max"], o[key]["mean"]], rel=1e-5)
    assert ds.projections.dims == ("angle", "y", "x") and ds.angle.attrs["units"] == "deg"
    flat, dark = ds.flats.mean("flat"), ds.darks.mean("dark")
    norm = (ds.projections - dark)/(flat - dark)
    for at, value in o["samples_normalised"].items(): assert float(norm[tuple(json.loads(at))]) == pytest.approx(value, rel=1e-5)


@needs_data
def test_txrm():
    o, ds = oracle("tomo")["files"]["sinograms/txrm_test_chip_tomo.txrm"], read(DATA/"sinograms/txrm_test_chip_tomo.txrm")
    p = ds.projections
    assert list(p.shape) == o["shape"] and p.dims == ("angle", "y", "x") and p.dtype.str[1:] == o["dtype"]
    assert p.values.mean((1, 2)) == pytest.approx(o["mean_per_image"]) and ds.angle.values == pytest.approx(o["angles_deg"])
    assert ds.energy.values == pytest.approx(list(o["energy_nonzero"].values())) and ds.exposure.values == pytest.approx(o["exposure_s"])
    assert ds.attrs["pixel_size_um"] == pytest.approx(o["pixel_size_um"]) and ds.attrs["start_time"] == "2015-11-09T18:19:21"
    for at, value in o["corner_pixels"].items(): assert int(p.values[tuple(json.loads(at))]) == value


@needs_data
@pytest.mark.parametrize("name", [n for n in (oracle("tomo")["files"] if DATA.is_dir() else []) if n.endswith(".xrm")])
def test_xrm(name):
    o, ds = oracle("tomo")["files"][name], read(DATA/name)
    image = ds.image
    assert list(image.shape) == o["shape"][1:] and image.values.mean() == pytest.approx(o["mean_per_image"][0]) and [int(image.min()), int(image.max())] == [o["min"], o["max"]]
    assert ds.attrs["pixel_size_um"] == pytest.approx(o["pixel_size_um"]) and float(ds.exposure) == pytest.approx(o["exposure_s"][0]) and float(ds.angle) == pytest.approx(o["angles_deg"][0])
    assert f"{float(ds.energy):07.1f}_eV" in name and any("taken from its name" in f for f in flags(ds))
    assert ds.attrs["kind"] == ("reference" if "_ref_" in name else "sample")


@needs_data
def test_txm_series_keeps_references_apart():
    o = oracle("tomo")["files"]
    ds = combine_images([read(p) for p in sorted((DATA/"xas/txm-nca").glob("*.xrm"), reverse=True)])
    assert ds.image.dims == ("energy", "y", "x") and ds.energy.values.tolist() == [8324.0, 8354.0]
    assert ds.flats.dims == ("flat", "y", "x") and ds.flat_energy.values.tolist() == [8324.0, 8354.0]
    for i, e in enumerate(("08324.0", "08354.0")):
        depth = -np.log(np.maximum(ds.image[i].values, 1)/np.maximum(ds.flats[i].values, 1))
        want = o[f"optical_depth_{e}_eV"]
        assert [depth.mean(), depth.std(), depth.min(), depth.max()] == pytest.approx([want[k] for k in ("mean", "std", "min", "max")], rel=1e-5)
        for at, value in want["pixels"].items(): assert depth[tuple(json.loads(at))] == pytest.approx(value, rel=1e-5)
    assert ds.time.values[1] == 28*60 + 15 and ds.flat_time.values[0] == 39 and any("were exposed" in f for f in flags(ds))


@needs_data
@pytest.mark.parametrize("side", ["ir", "vi"])
def test_fusion_images(side):
    for number, pair in oracle("fusion")["pairs"].items():
        image = read(DATA/"fusion"/side/f"{number}.bmp").image
        assert list(image.shape) == pair["shape"] and float(image.astype(float).mean()) == pytest.approx(pair[f"{side}_mean"])


# -- larger than memory --------------------------------------------------------------------------------------------------------------

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")

# getrusage's ru_maxrss of a child starts at its parent's peak; VmHWM is the process's own
STREAM = """
import sys
import numpy as np
path, hints = sys.argv[1], eval(sys.argv[2])
from batt_nb.campaign.imaging import READER
head = open(path, "rb").read(4096)
read = next(f for f in READER.formats if f.sniff(path, head) and not f.generic).read
ds = read(path, **hints)
da = (ds.image if "image" in ds else ds.projections).data
top = sum(int(da.blocks[i].compute(scheduler="synchronous").max()) for i in range(da.numblocks[0]))
print(da.nbytes, top, max(np.prod(c)*da.dtype.itemsize for c in [(n, *da.shape[1:]) for n in da.chunks[0]]), next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))*1024)
"""


def streamed(path, hints):
    out = subprocess.run([sys.executable, "-c", STREAM, str(path), repr(hints)], capture_output=True, text=True, check=True)
    return [int(float(v)) for v in out.stdout.split()]


@on_linux
def test_large_tiff_streams(tmp_path):
    stack = tifffile.memmap(tmp_path/"big.tif", shape=(512, 1024, 1024), dtype="u2", bigtiff=True, metadata=None, photometric="minisblack")
    stack[3, 5, 5], stack[-1, 0, 0] = 7, 11
    stack.flush()
    nbytes, top, block, memory = streamed(tmp_path/"big.tif", {"axis": "z"})
    assert nbytes == 2**30 and top == 18 and 8*2**20 <= block <= 16*2**20 and memory < 500*2**20


@on_linux
def test_large_hdf5_streams(tmp_path):
    with h5py.File(tmp_path/"big.h5", "w") as f:
        data = f.create_dataset("exchange/data", (512, 1024, 1024), "u2", chunks=(1, 1024, 1024))
        data[3, 5, 5], data[-1, 0, 0] = 7, 11
        f["exchange/theta"] = np.linspace(0, 180, 512)
    nbytes, top, block, memory = streamed(tmp_path/"big.h5", {})
    assert nbytes == 2**30 and top == 18 and 8*2**20 <= block <= 16*2**20 and memory < 500*2**20


@pytest.mark.parametrize("options", [dict(), dict(compression="zlib"), dict(tile=(64, 64)), dict(byteorder=">"), dict(rowsperstrip=10), dict(imagej=True), dict(predictor=2, compression="zlib")])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_lazy_and_loaded_agree(tmp_path, options, dtype):
    if dtype == "f4" and "predictor" in options: options = dict(compression="zlib", tile=(32, 48))
    truth = np.random.default_rng(0).integers(0, 120, (7, 100, 130)).astype(dtype)
    tifffile.imwrite(tmp_path/"a.tif", truth, photometric="minisblack", **({} if options.get("imagej") else {"metadata": None}), **options)
    lazy, loaded = (read_tiff(tmp_path/"a.tif", axis="z", lazy=v).image for v in (True, False))
    assert (loaded.values == truth).all() and hasattr(lazy.data, "dask") and lazy.dtype == truth.dtype and lazy.dtype.isnative
    assert (lazy[2:6:3, 10:20, ::-1].values == truth[2:6:3, 10:20, ::-1]).all() and (lazy[::-2].values == truth[::-2]).all() and (lazy[4].values == truth[4]).all()


def test_file_vanishes_or_changes_before_it_is_computed(tmp_path):
    path = tmp_path/"a.tif"
    tifffile.imwrite(path, np.zeros((5, 30, 30), "u2"), photometric="minisblack", metadata=None)
    lazy = read_tiff(path, lazy=True).image
    os.utime(path, ns=(1, 1))
    with pytest.raises(BattError, match="has changed since it was opened"): lazy.compute(scheduler="synchronous")
    path.unlink()
    with pytest.raises(BattError, match="has vanished since it was opened"): lazy.compute(scheduler="synchronous")


def test_series_of_lazy_files(tmp_path):
    for i in range(12): tifffile.imwrite(tmp_path/f"p_{i}.tif", np.full((40, 50), i, "u2"))
    parts = [read(tmp_path/f"p_{i}.tif", lazy=True, axis="angle") for i in range(12)]
    ds = combine_images(parts, axis="angle", angles=[0, 110])
    assert hasattr(ds.projections.data, "dask") and ds.projections[:, 0, 0].values.tolist() == list(range(12)) and ds.angle.values[-1] == 110


# -- what must not pass ----------------------------------------------------------------------------------------------------------------

def cut(source, target, keep): target.write_bytes(source.read_bytes()[:keep]); return target


@needs_data
@pytest.mark.parametrize("name, share", [("xct/volumes/cement_128x128x128.tif", .5), ("xct/battery-21700/Battery_21700.tif", .9), ("xct/microstructures/nmc-cbd-251x301x301.tif", .9),
                                         ("xct/microstructures/three-phase-electrode-256.tiff", .5), ("sinograms/tooth.h5", .5), ("sinograms/txrm_test_chip_tomo.txrm", .5),
                                         ("xct/scribbles/carbon.png", .5), ("fusion/ir/1.bmp", .5)])
def test_truncated_files(tmp_path, name, share):
    path = cut(DATA/name, tmp_path/Path(name).name, int((DATA/name).stat().st_size*share))
    with pytest.raises(BattError) as e: read(path)
    assert e.value.mend and path.name in str(e.value.file)


@pytest.mark.parametrize("reader", [read_tiff, read_picture, read_h5, read_zeiss])
@pytest.mark.parametrize("content", [b"", b"this is no image, whatever its name says\n"*20])
def test_empty_and_wrong_content(tmp_path, reader, content):
    (tmp_path/"a.tif").write_bytes(content)
    with pytest.raises(BattError, match="a.tif"): reader(tmp_path/"a.tif")
    assert not any(f.sniff(tmp_path/"a.tif", content) for f in READER.formats)


@needs_data
def test_wrong_extension_is_no_obstacle(tmp_path):
    path = tmp_path/"tooth.tif"
    path.write_bytes((DATA/"sinograms/tooth.h5").read_bytes())
    assert "projections" in read(path)


def scan(path, n=5, angles=None, unit="deg", **more):
    with h5py.File(path, "w") as f:
        f["scan/frames"] = np.arange(n*6, dtype="u2").reshape(n, 2, 3)
        if angles is not None:
            f["scan/phi"] = angles
            if unit: f["scan/phi"].attrs["units"] = unit
        for k, v in more.items(): f[f"scan/{k}"] = v
    return path


MAP = {"paths": {"projections": "scan/frames", "angle": "scan/phi"}}


@pytest.mark.parametrize("angles, unit, hints, says", [
    (None, "deg", {"paths": {"projections": "scan/frames"}}, "angles are missing"),
    (None, "deg", MAP, r"no dataset scan/phi.*/scan/frames \(5, 2, 3\)"),
    (np.arange(5.0), "deg", {"paths": {"projections": "scan/frame"}}, r"no dataset scan/frame .*/scan/frames \(5, 2, 3\)"),
    (np.arange(5.0), "deg", {"paths": {"projection": "scan/frames"}}, "no part of an image file"),
    (np.arange(4.0), "deg", MAP, "4 angles for 5 frames"),
    (np.r_[0, np.nan, 2, 3, 4], "deg", MAP, "1 of 5 angles are NaN"),
    (np.linspace(0, 3, 5), "", MAP, "degrees or radians"),
    (np.arange(5.0), "mm", MAP, "angles are in 'mm'"),
    (np.arange(5.0), "deg", {"paths": {"projections": "scan/phi"}}, "no stack of images"),
    (np.arange(5.0), "deg", {}, "no known layout"),
])
def test_path_map(tmp_path, angles, unit, hints, says):
    with pytest.raises(BattError, match=says): read(scan(tmp_path/"a.h5", angles=angles, unit=unit), **hints)


def test_path_map_with_hints(tmp_path):
    ds = read(scan(tmp_path/"a.h5", angles=np.linspace(0, np.pi, 5), unit=""), **MAP, angle_unit="rad", pixel_size_um=0.7)
    assert ds.angle.values == pytest.approx(np.linspace(0, 180, 5)) and ds.attrs["pixel_size_um"] == 0.7 and ds.x.values[1] == pytest.approx(.7)
    ds = read(scan(tmp_path/"b.h5", e=np.arange(5.0)), paths={"image": "scan/frames"})
    assert ds.image.dims == ("frame", "y", "x")
    with h5py.File(tmp_path/"b.h5", "a") as f: f["scan/e"].attrs["units"] = "keV"
    ds = read(tmp_path/"b.h5", paths={"image": "scan/frames", "energy": "scan/e"})
    assert ds.image.dims == ("energy", "y", "x") and ds.energy.values.tolist() == [0, 1000, 2000, 3000, 4000]


def test_several_nxtomo_entries_need_a_choice(tmp_path):
    with h5py.File(tmp_path/"two.nx", "w") as f:
        for e in ("entry0000", "entry0001"):
            f[f"{e}/instrument/detector/data"], f[f"{e}/instrument/detector/image_key"] = np.zeros((4, 2, 3), "u2"), [2, 1, 0, 0]
            f[f"{e}/sample/rotation_angle"] = [0.0, 0, 0, 90]; f[f"{e}/sample/rotation_angle"].attrs["units"] = "degree"
            f[f"{e}/instrument/detector/x_pixel_size"] = f[f"{e}/instrument/detector/y_pixel_size"] = 6.5e-6
            for side in "xy": f[f"{e}/instrument/detector/{side}_pixel_size"].attrs["units"] = "m"
    with pytest.raises(BattError, match="entry = /entry0000 or /entry0001"): read(tmp_path/"two.nx")
    ds = read(tmp_path/"two.nx", entry="entry0001")
    assert ds.sizes == {"angle": 2, "flat": 1, "dark": 1, "y": 2, "x": 3} and ds.angle.values.tolist() == [0, 90] and ds.attrs["pixel_size_um"] == pytest.approx(6.5)


def test_virtual_dataset_without_its_sources(tmp_path):
    with h5py.File(tmp_path/"part.h5", "w") as f: f["d"] = np.ones((4, 2, 3), "u2")
    layout = h5py.VirtualLayout((4, 2, 3), "u2"); layout[:] = h5py.VirtualSource("part.h5", "d", (4, 2, 3))
    with h5py.File(tmp_path/"a.h5", "w") as f: f.create_virtual_dataset("exchange/data", layout); f["exchange/theta"] = np.linspace(0, 180, 4)
    assert (read(tmp_path/"a.h5").projections == 1).all()
    (tmp_path/"part.h5").unlink()
    with pytest.raises(BattError, match="would read as zeros"): read(tmp_path/"a.h5")


def test_nan_pixels_are_flagged(tmp_path):
    image = np.ones((4, 5), "f4"); image[1, 1] = np.nan
    tifffile.imwrite(tmp_path/"a.tif", image)
    assert any("1 of 20 pixels" in f for f in flags(read(tmp_path/"a.tif")))


@pytest.mark.parametrize("options, pixel", [(dict(resolution=(300, 300), resolutionunit="INCH"), None), (dict(resolution=(2e4, 2e4), resolutionunit="CENTIMETER"), .5),
                                            (dict(imagej=True, resolution=(4, 4), metadata={"unit": "um"}), .25), (dict(imagej=True, resolution=(1, 1)), None)])
def test_pixel_size_only_where_the_file_says_it(tmp_path, options, pixel):
    tifffile.imwrite(tmp_path/"a.tif", np.ones((4, 5), "u2"), **options)
    assert read(tmp_path/"a.tif").attrs.get("pixel_size_um") == (pixel if pixel is None else pytest.approx(pixel))


def test_series_from_names_with_flats_and_darks(tmp_path):
    for name, v in {"p_090.0deg.tif": 2, "p_000.0deg.tif": 1, "flat_1.tif": 100, "flat_2.tif": 101, "dark_1.tif": 5}.items(): tifffile.imwrite(tmp_path/name, np.full((3, 4), v, "u2"))
    hints = dict(axis="angle", name_values=r"_([\d.]+)deg", flats="flat*", darks="dark*")
    ds = combine_images([read(p, **hints) for p in tmp_path.iterdir()], **hints)
    assert ds.angle.values.tolist() == [0, 90] and ds.projections[:, 0, 0].values.tolist() == [1, 2]
    assert ds.flats[:, 0, 0].values.tolist() == [100, 101] and ds.darks.shape == (1, 3, 4) and ds.flat_source.values.tolist() == ["flat_1.tif", "flat_2.tif"]
    with pytest.raises(BattError, match="only flat and dark fields"): combine_images([read(tmp_path/"flat_1.tif", **hints)], **hints)
    with pytest.raises(BattError, match="no regular expression"): combine_images([read(tmp_path/"p_000.0deg.tif")]*2, axis="angle", name_values="(")


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="imagecodecs is installed: LZW can be decoded")
def test_missing_decoder_is_named(tmp_path):
    Image.fromarray(np.zeros((6, 7), "u1")).save(tmp_path/"a.tif", compression="tiff_lzw")
    with pytest.raises(BattError, match="install imagecodecs"): read(tmp_path/"a.tif")


def test_color_is_refused(tmp_path):
    tifffile.imwrite(tmp_path/"a.tif", np.random.default_rng(0).integers(0, 255, (6, 7, 3)).astype("u1"), photometric="rgb")
    with pytest.raises(BattError, match="in color"): read(tmp_path/"a.tif")


def test_interrupted_bigtiff_is_noticed(tmp_path):
    truth = np.zeros((4, 64, 64), "u2")
    with tifffile.TiffWriter(tmp_path/"a.tif") as t:
        for image in truth: t.write(image, contiguous=False, metadata=None)
    with pytest.raises(BattError): read(cut(tmp_path/"a.tif", tmp_path/"b.tif", 3*64*64*2))
    assert EAGER > truth.nbytes
