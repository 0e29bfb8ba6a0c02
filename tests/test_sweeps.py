"""Sweeps: spaces are checked, the best setting of a known valley is found, a folder is gone on from, two processes share it, and one that is killed loses nothing."""
import json
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

optuna = pytest.importorskip("optuna")

from batt_nb.core import BattError
from batt_nb.sweeps import best_setting, draw_sweep, read_space, read_sweep, sweep

BOX = {"x": (-5.0, 5.0), "kind": ["a", "b", None]}

WORKER = """
import json, os, sys, time
from batt_nb.sweeps import sweep
folder, name, trials, pause, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), json.loads(sys.argv[5])
open(f"{folder}/{name}.up", "w").close()
while not all(os.path.exists(f"{folder}/{other}.up") for other in sys.argv[6]): time.sleep(0.01)
n = 0
def objective(x):
    global n
    n += 1
    with open(f"{folder}/{name}.began", "a") as f: f.write(f"{x!r}\\n")
    time.sleep(pause)
    if n == kill_at or x == kill_at: os.kill(os.getpid(), 9)
    return (x - 1)**2
out = sweep(objective, {"x": (-5.0, 5.0)}, trials=trials, folder=folder, method="random", progress=False, start=[{"x": -4.5}])
print(json.dumps({"states": out.state.values.tolist()}))
"""


def worker(folder, name, trials, pause=0.0, kill_at=None, together=""):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), name, str(trials), str(pause), json.dumps(kill_at), together], stdout=subprocess.PIPE, text=True)


def bowl(x, kind): return (x - 1)**2 + {"a": 0, "b": 2, None: 1}[kind]


@pytest.mark.parametrize("space, key", [({"x": (1, 0)}, "x"), ({"x": (0, 1, "log")}, "x"), ({"x": (1, 2, "cube")}, "x"), ({"x": []}, "x"), ({"x": [1, 1]}, "x"), ({"x": [[1]]}, "x"), ({"x": 3}, "x"),
                                        ({"x": (1,)}, "x"), ({"x": (False, True)}, "x"), ({"x": (0, float("nan"))}, "x"), ({"a b": [1]}, "space"), ({"state": [1]}, "space"), ({}, "space"), ([1], "space")])
def test_bad_spaces_say_which_parameter_and_how_to_mend(space, key):
    with pytest.raises(BattError) as e: sweep(bowl, space, trials=1, progress=False)
    assert e.value.key == key and e.value.mend


def test_types_of_ranges():
    space = read_space({"a": (1, 8), "b": (1, 8.0), "c": (1e-3, 1, "log"), "d": (1, 64, "log"), "e": [True, False]})
    assert [type(d).__name__ for d in space.values()] == ["IntDistribution", "FloatDistribution", "FloatDistribution", "IntDistribution", "CategoricalDistribution"]
    assert [space[k].log for k in "abcd"] == [False, False, True, True]


def test_other_errors():
    for options, key in ((dict(method="annealing"), "method"), (dict(direction="up"), "direction"), (dict(trials=0), "trials"), (dict(trials=None), "trials"), (dict(start=[{"x": 7.0}]), "x"), (dict(start=[{"y": 0}]), "y"), (dict(method="grid"), "x")):
        with pytest.raises(BattError) as e: sweep(bowl, BOX, **{"trials": 2, "progress": False} | options)
        assert e.value.key == key


def test_the_valley_is_found_and_the_table_is_whole(tmp_path):
    before = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sweep(bowl, BOX, trials=35, seed=2, folder=tmp_path, quantity="Loss", progress=False)
    assert optuna.logging.get_verbosity() == before # silent here, untouched for the user
    assert found.attrs["best_value"] < 0.1 and best_setting(found)["kind"] == "a" and abs(best_setting(found)["x"] - 1) < 0.3
    assert found.sizes["trial"] == 35 == found.attrs["complete"] and (found.state == "complete").all() and (found.seconds >= 0).all()
    assert np.allclose(found.value, [bowl(x, None if k == "None" else str(k)) for x, k in zip(found.x.values, found.kind.values)])
    assert np.array_equal(found.best_so_far, np.minimum.accumulate(found.value.values)) and found.value.attrs["long_name"] == "Loss"
    found.to_netcdf(tmp_path/"table.nc", engine="h5netcdf")
    worse = sweep(bowl, BOX, trials=20, direction="maximize", progress=False)
    assert worse.attrs["best_value"] == worse.value.max() > 20 and np.array_equal(worse.best_so_far, np.maximum.accumulate(worse.value.values))
    figure = draw_sweep(found)
    assert [a.get_xlabel() for a in figure.axes[:3]] == ["x", "kind", "trial"] and figure.axes[0].get_ylabel() == "Loss"


@pytest.mark.slow
def test_tpe_needs_fewer_trials_than_chance():
    space = {"x": (1e-5, 1e-1, "log"), "y": (0.0, 1.0), "kind": ["a", "b"]}
    f = lambda x, y, kind: (np.log10(x) + 2)**2 + (y - .3)**2 + .5*(kind == "b")
    best = {m: np.median([sweep(f, space, trials=22, method=m, seed=s, progress=False).attrs["best_value"] for s in range(4)]) for m in ("tpe", "random")}
    assert best["tpe"] < 0.6*best["random"], best


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_a_sweep_in_parts_equals_one_in_a_piece(tmp_path, method):
    options = dict(seed=5, method=method, start=[{"x": 0.0}], progress=False)
    whole = sweep(bowl, BOX, trials=16, **options)
    for n in (3, 12, 16): parts = sweep(bowl, BOX, trials=n, folder=tmp_path, **options)
    assert np.array_equal(parts.x, whole.x) and np.array_equal(parts.value, whole.value) and parts.attrs == whole.attrs and float(parts.x[0]) == 0.0
    assert not np.array_equal(sweep(bowl, BOX, trials=16, **options | {"seed": 6}).x, whole.x)
    assert len(np.unique(whole.x)) == 16 # no setting is drawn twice by a generator that begins anew
    with pytest.raises(BattError, match="space"): sweep(bowl, {"x": (0.0, 1.0), "kind": ["a"]}, trials=20, folder=tmp_path, **options | {"start": ()})
    (tmp_path/"begun").mkdir(); (tmp_path/"begun"/"sweep.journal").touch() # another process is about to make it
    for place in ("elsewhere", "begun"):
        with pytest.raises(BattError, match="no sweep"): read_sweep(tmp_path/place)
    assert sweep(lambda x: x, {"x": (0.0, 1.0)}, trials=2, direction="maximize", folder=tmp_path/"begun", progress=False).attrs["complete"] == 2


def test_a_grid_is_tried_once_each(tmp_path):
    tried = []
    def f(a, b): tried.append((a, b)); return a*b
    sweep(f, {"a": [1, 2, 3], "b": [4, 5]}, method="grid", trials=4, folder=tmp_path, start=[{"a": 3, "b": 5}], progress=False)
    out = sweep(f, {"a": [1, 2, 3], "b": [4, 5]}, method="grid", folder=tmp_path, start=[{"a": 3, "b": 5}], progress=False)
    assert tried[0] == (3, 5) and sorted(tried) == [(a, b) for a in (1, 2, 3) for b in (4, 5)] and best_setting(out) == {"a": 1, "b": 4}


def test_failed_trials_are_kept_with_their_error(tmp_path):
    def f(x):
        if x > 3: raise MemoryError("too wide")
        return float("nan") if x < -3 else (x, {"twice": 2*x})
    out = sweep(f, {"x": (-5.0, 5.0)}, trials=30, method="random", folder=tmp_path, progress=False)
    wide, low = out.x.values > 3, out.x.values < -3
    assert wide.any() and low.any() and out.attrs["failed"] == (wide | low).sum() and out.attrs["complete"] == 30 - out.attrs["failed"]
    assert (out.error.values[wide] == "MemoryError: too wide").all() and all("nan" in e for e in out.error.values[low]) and np.isnan(out.value.values[wide | low]).all()
    assert np.allclose(out.twice.values[~(wide | low)], 2*out.x.values[~(wide | low)]) and np.isnan(out.twice.values[wide]).all()
    draw_sweep(out)
    with pytest.raises(BattError, match="too wide"): sweep(lambda x: f(4), {"x": (0.0, 1.0)}, trials=3, folder=tmp_path/"none", progress=False)
    assert read_sweep(tmp_path/"none").attrs["failed"] == 3


def test_stopped_by_the_user_the_trial_is_done_again(tmp_path):
    seen = []
    def f(x):
        seen.append(x)
        if len(seen) == 3: raise KeyboardInterrupt
        return x
    with pytest.raises(KeyboardInterrupt): sweep(f, {"x": (0.0, 1.0)}, trials=6, folder=tmp_path, progress=False)
    out = sweep(f, {"x": (0.0, 1.0)}, trials=6, folder=tmp_path, progress=False)
    assert seen[2] == seen[3] and out.attrs["complete"] == 6 and out.attrs["lost"] == 1 and not list(tmp_path.glob("*.worker"))


def test_two_processes_share_a_folder(tmp_path):
    both = [worker(tmp_path, name, 14, pause=0.15, together="ab") for name in "ab"]
    tables = [json.loads(p.communicate(timeout=60)[0]) for p in both]
    began = {n: (tmp_path/f"{n}.began").read_text().split() for n in "ab"}
    out = read_sweep(tmp_path)
    assert min(map(len, began.values())) >= 2, began # both worked
    assert sorted(began["a"] + began["b"]) == sorted(repr(float(x)) for x in out.x.values) and len(set(began["a"] + began["b"])) == 14 # each setting once
    assert all(t["states"] == ["complete"]*14 for t in tables) # each waited for the other's last trial
    one = sweep(lambda x: (x - 1)**2, {"x": (-5.0, 5.0)}, trials=14, method="random", start=[{"x": -4.5}], progress=False)
    assert np.array_equal(np.sort(one.x), np.sort(out.x)) # and the same settings as one process tries


def test_a_killed_process_loses_nothing(tmp_path):
    assert worker(tmp_path, "a", 6, kill_at=4).wait(timeout=60) == -signal.SIGKILL
    assert read_sweep(tmp_path).state.values.tolist() == ["complete"]*3 + ["running"]
    with open(tmp_path/"sweep.journal", "ab") as f: f.write(b'{"op_code":4,"wor') # as a full disk leaves it
    began = time.perf_counter()
    out = sweep(lambda x: (x - 1)**2, {"x": (-5.0, 5.0)}, trials=6, folder=tmp_path, method="random", start=[{"x": -4.5}], progress=False)
    assert time.perf_counter() - began < 20 # nobody waits half a minute for the dead one's lock
    assert out.state.values.tolist() == ["complete"]*3 + ["lost"] + ["complete"]*3 and out.attrs["lost"] == 1
    assert float(out.x[4]) == float(out.x[3]) and "its process ended" in str(out.error.values[3])
    whole = sweep(lambda x: (x - 1)**2, {"x": (-5.0, 5.0)}, trials=6, method="random", start=[{"x": -4.5}], progress=False)
    assert np.array_equal(out.x.values[out.state == "complete"], whole.x) # as though nothing had happened


def test_a_setting_that_kills_twice_is_a_failure(tmp_path):
    for _ in range(2): assert worker(tmp_path, "a", 4, kill_at=-4.5).wait(timeout=60) == -signal.SIGKILL
    out = sweep(lambda x: (x - 1)**2, {"x": (-5.0, 5.0)}, trials=4, folder=tmp_path, method="random", start=[{"x": -4.5}], progress=False)
    assert out.state.values.tolist() == ["lost", "failed", "complete", "complete", "complete"] and "twice" in str(out.error.values[1])
