"""The trainer: a resumed run equals an uninterrupted one bit for bit, two processes equal one, files are whole or absent."""
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from batt_nb.core import BattError
from batt_nb.learn import fit, generator, load, rate, read_tensors, save, seeded, write_tensors

torch = pytest.importorskip("torch")

X = torch.linspace(-1, 1, 96)[:, None]
Y = torch.sin(4*X)
HELD = [(X[1::3], Y[1::3]), (X[2::3], Y[2::3])]


pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed=0, norm=True):
    with seeded(seed, "weights"):
        return torch.nn.Sequential(torch.nn.Linear(1, 16), *([torch.nn.BatchNorm1d(16)] if norm else []), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 1))


def batches(epoch, g):
    return [(X[k] + 0.01*torch.randn((len(k), 1), generator=g), Y[k]) for k in torch.randperm(96, generator=g).split(24)]


def squared(model, x, y): return torch.nn.functional.mse_loss(model(x), y)


def train(model, batches=batches, **options):
    return fit(model, batches, squared, **{"valid": HELD, "epochs": 8, "lr": 1e-2, "seed": 5, "progress": False} | options)


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("options", [
    {}, {"valid": None}, {"every": 3}, {"schedule": "constant", "warmup": 2, "clip": None}, {"precision": "bfloat16"}, {"precision": "float16"},
    {"optimizer": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True)}, {"optimizer": lambda p, lr: torch.optim.RAdam(p, lr)}],
    ids=["plain", "unvalidated", "every third", "constant", "bfloat16", "float16", "SGD", "RAdam"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, options):
    whole, killed, resumed = network(), network(), network(9)
    history = train(whole, **options)

    def dying(epoch, g):
        for k, batch in enumerate(batches(epoch, g)):
            if epoch == 5 and k == 2: raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt): train(killed, dying, folder=tmp_path, **options)
    assert len(read_tensors(tmp_path/"last.safetensors")[1]["rows"]) == (3 if options.get("every") else 5)
    torch.rand(7) # another state of the global generator must not matter
    again = train(resumed, folder=tmp_path, resume=True, **options)
    assert same(whole, resumed)
    xr.testing.assert_identical(history.drop_vars("seconds"), again.drop_vars("seconds"))
    assert np.isfinite(history.train_loss).all() and float(history.train_loss[-1]) < float(history.train_loss[0])


def test_a_finished_run_resumes_to_itself(tmp_path):
    first, second = network(), network(9)
    one = train(first, folder=tmp_path)
    two = train(second, lambda epoch, g: 1/0, folder=tmp_path, resume=True)
    assert same(first, second)
    xr.testing.assert_identical(one, two)


def test_the_best_weights_are_kept_and_the_run_stops():
    model = network()
    kept = {}

    def valid():
        kept[len(kept)] = {k: v.clone() for k, v in model.state_dict().items()}
        return HELD

    history = train(model, valid=valid, epochs=200, lr=0.3, schedule="constant", patience=6)
    best = int(history.valid_loss.values.argmin())
    assert history.attrs["stopped"] == "patience" and history.sizes["epoch"] == best + 7 and history.attrs["best_epoch"] == best
    assert all(torch.equal(kept[best][k], v) for k, v in model.state_dict().items()) and not model.training
    with torch.no_grad(): assert np.isclose(np.mean([float(squared(model, *b)) for b in HELD]), history.valid_loss[best], rtol=1e-6)


def test_seed_decides_and_nothing_else_is_touched():
    before = torch.random.get_rng_state()
    one, two, other = network(), network(), network()
    train(one), train(two), train(other, seed=6)
    assert same(one, two) and not same(one, other) and torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(torch.randperm(9, generator=generator(1, "a")), torch.randperm(9, generator=generator(1, "a")))


def test_rate():
    assert rate(1.0, 0, 10) == 1 and rate(1.0, 5, 10) == pytest.approx(0.5) and rate(1.0, 0, 10, warmup=3) == 0.25
    assert rate(1.0, 9, 10, "constant") == 1
    with pytest.raises(BattError, match="schedule"): rate(1.0, 0, 10, "steps")


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = save(network(), {"width": 16}, tmp_path/"deep"/"net.safetensors")
    model, config = load(path, lambda config: network(3))
    assert config == {"width": 16} and same(model, network()) and not model.training
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): save(network(4), {"width": 17}, path)
    assert [p.name for p in path.parent.iterdir()] == ["net.safetensors"] and load(path, lambda c: network(3))[1] == {"width": 16}
    monkeypatch.undo()
    with pytest.raises(BattError, match="another network"): load(path, lambda config: torch.nn.Linear(1, 1))
    for text in (b"", b"x"*40, path.read_bytes()[:50]):
        path.write_bytes(text)
        with pytest.raises(BattError, match="cut off"): load(path, lambda config: network())
    with pytest.raises(BattError, match="no such file"): load(tmp_path/"none", lambda config: network())


def test_tied_and_strided_tensors(tmp_path):
    a = torch.arange(12.0).reshape(3, 4)
    tensors, header = read_tensors(write_tensors(tmp_path/"t.safetensors", {"a": a, "b": a, "c": a.T, "n": torch.tensor(3)}, {"x": 0.1 + 0.2, "nan": float("nan")}))
    assert torch.equal(tensors["b"], a) and torch.equal(tensors["c"], a.T) and tensors["n"].shape == () and header["x"] == 0.1 + 0.2


def test_errors(tmp_path):
    for options, words in (({"batches": lambda e, g: []}, "no batch"), ({"batches": lambda e, g: [(X, Y*np.nan)]}, "nan"), ({"precision": "half"}, "precision"),
                           ({"resume": True}, "folder")):
        with pytest.raises(BattError, match=words): train(network(), **options)
    train(network(), folder=tmp_path, epochs=2)
    with pytest.raises(BattError, match="other settings.*epochs"): train(network(), folder=tmp_path, epochs=3, resume=True)
    with pytest.raises(BattError, match="another network"): train(network(norm=False), folder=tmp_path, epochs=2, resume=True)


SCRIPT = """
    import sys
    import torch
    from batt_nb.learn import fit, save, seeded
    torch.set_num_threads(1)
    X = torch.linspace(-1, 1, 96)[:, None]; Y = torch.sin(4*X)
    with seeded(0, "weights"): model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    stop = int(sys.argv[3])
    def batches(epoch, g):
        if epoch == stop: raise KeyboardInterrupt
        return [(X[k], Y[k]) for k in torch.randperm(96, generator=g).split(int(sys.argv[2]))]
    squared = lambda m, x, y: torch.nn.functional.mse_loss(m(x), y)
    try: h = fit(model, batches, squared, valid=[(X[:32], Y[:32]), (X[32:64], Y[32:64]), (X[64:], Y[64:])], epochs=4, lr=1e-2, seed=1, folder=sys.argv[1] + "/run", resume=True, progress=False)
    except KeyboardInterrupt: sys.exit(0)
    import os
    save(model, {"valid": h.valid_loss.values.tolist()}, f"{sys.argv[1]}/rank{os.environ.get('RANK', 'single')}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_equal_one_with_double_batches(tmp_path):
    script = tmp_path/"train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root, environment = Path(__file__).resolve().parent.parent, {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(root)
    pair = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(tmp_path)]
    for stop in ("2", "-1"): # killed after two epochs, then resumed
        subprocess.run([*pair, "12", stop], check=True, env=environment, cwd=root, capture_output=True, timeout=120)
    (tmp_path/"run"/"last.safetensors").unlink()
    subprocess.run([sys.executable, str(script), str(tmp_path), "24", "-1"], check=True, env=environment, cwd=root, timeout=120)
    ranks = [read_tensors(tmp_path/f"rank{r}.safetensors") for r in (0, 1, "single")]
    for k, v in ranks[0][0].items():
        assert torch.equal(v, ranks[1][0][k])
    assert np.allclose(ranks[0][1]["valid"], ranks[2][1]["valid"], rtol=1e-5) and ranks[0][1]["valid"] == ranks[1][1]["valid"]
    for k, v in ranks[0][0].items(): assert torch.allclose(v, ranks[2][0][k], atol=1e-5)
