"""Views of a segmentation network: maps are those of the network, gradients are slopes and stay inside its reach, the landscape's middle is the loss, t-SNE comes with honest numbers, and nothing is changed.
Sweeps of a segmenter: strokes to choose by are never learned from, and the best setting is fitted to all."""
import copy

import numpy as np
import pytest
import xarray as xr
from scipy import ndimage

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from batt_nb.cleaning.network_views import (activations, draw_activations, draw_embedding, draw_gradient, draw_landscape, draw_norms, embed, filter_direction, gradient_norms, input_gradient,
                                            loss_landscape, mean_loss, neighbor_agreement, training_batches, untrained)
from batt_nb.cleaning import segmenter_sweeps
from batt_nb.cleaning.segmentation import Segmenter, _normalized, ask, encode, find_strokes, stroke_loss
from batt_nb.cleaning.segmenter_sweeps import log_likelihood, mean_iou, split_strokes, stroke_score, sweep_segmenter
from batt_nb.core import BattError, history
from batt_nb.sweeps import read_sweep

pytestmark = pytest.mark.usefixtures("one_thread")

CODES = {"pore": 10, "solid": 30}


def phantom(seed, size=(8, 64, 64)):
    "Bright balls in noise, as codes, and strokes on three slices."
    r = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    truth = np.where(np.min([np.linalg.norm(at - r.uniform(0, size), axis=-1) - 11 for _ in range(6)], 0) < 0, 30, 10).astype("u1")
    coords = {d: (d, np.arange(n)*.5, {"units": "µm"}) for d, n in zip("zyx", size)}
    grey = xr.DataArray((ndimage.gaussian_filter((truth == 30)*1.0, .6) + .3*r.normal(size=size)).astype("f4"), coords, ("z", "y", "x"), "image")
    marks = np.full(size, 255, "u1")
    for z in (2, 4, 5):
        for c in CODES.values():
            at = np.argwhere(truth[z] == c)
            for y, x in at[r.integers(len(at), size=5)]:
                here = (z, slice(max(y - 1, 0), y + 2), slice(max(x - 2, 0), x + 3))
                marks[here] = np.where(truth[here] == c, c, 255)
    return grey, grey.copy(data=truth), grey.copy(data=marks)


@pytest.fixture(scope="module")
def case(): return phantom(0)


def fitted(case, **options):
    return Segmenter(CODES, **{"teacher": None, "epochs": 6, "steps": 6, "width": 4, "depth": 2, "crop": 32, "batch": 4, "context": 1, "turns": 1, "adapt": False, "progress": False} | options).fit(case[0], case[2], ignore=255)


@pytest.fixture(scope="module")
def model(case): return fitted(case)


@pytest.fixture(scope="module")
def others(case):
    short = dict(epochs=1, steps=1, width=2, batch=2)
    return {"deep": fitted(case, dims=3, depth=1, crop=8, **short), "lrcs": fitted(case, network="lrcs", context=0, **short), "segnet": fitted(case, network="segnet", **short), "xlearn": fitted(case, network="xlearn", **short)}


def state(m):
    "Everything that a view could leave changed."
    net = m.network_
    return ({k: v.numpy().tobytes() for k, v in net.state_dict().items()}, [x.training for x in net.modules()], [len(x._forward_hooks) for x in net.modules()], [(p.grad is None, p.requires_grad, str(p.device)) for p in net.parameters()],
            torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), torch.is_grad_enabled(), {k: v for k, v in m.__dict__.items() if isinstance(v, (int, float, str, list, dict))}, [id(m.network_), id(m.forest_)])


def test_nothing_is_changed(case, model):
    grey, _, marks = case
    taught = copy.copy(model) # one in the middle of being trained: some parts in training mode, statistics would move
    taught.network_ = copy.deepcopy(model.network_).train()
    taught.network_.down[1].eval()
    inputs = grey.copy(deep=True), marks.copy(deep=True)
    before = state(taught)
    for view in (lambda: activations(taught, grey), lambda: input_gradient(taught, grey, (20, 20), "pore"), lambda: gradient_norms(taught, grey, marks, ignore=255, batches=1), lambda: untrained(taught),
                 lambda: loss_landscape(taught, grey, marks, ignore=255, batches=1, steps=3, progress=False), lambda: embed(taught, grey, marks, ignore=255, most=60)):
        view()
        assert state(taught) == before
    with pytest.raises(BattError): embed(taught, grey, marks, ignore=255, layer="middle")
    bad = marks.copy(data=np.where(marks == 255, 77, marks))
    with pytest.raises(BattError): loss_landscape(taught, grey, bad, ignore=255)
    with torch.no_grad(): input_gradient(taught, grey, (20, 20), "pore") # whatever the user has switched off
    assert state(taught) == before
    xr.testing.assert_identical(grey, inputs[0]); xr.testing.assert_identical(marks, inputs[1])


def test_an_error_inside_the_network_leaves_no_hook(case, model, monkeypatch):
    def broken(x): raise RuntimeError("broken")
    before = state(model)
    monkeypatch.setattr(model.network_.up[1], "forward", broken)
    with pytest.raises(RuntimeError): activations(model, case[0])
    monkeypatch.undo()
    assert state(model) == before


def test_maps_are_those_of_the_network(case, model, others):
    grey = case[0]
    v = _normalized(grey.values, model.center_, model.scale_)
    for m in (model, others["lrcs"], others["segnet"], others["deep"]):
        maps = activations(m, grey, z=1)
        p = np.exp(maps["logits"].values); p /= p.sum(0)
        asked = ask(m.network_, v, m.context_, 1)
        assert np.abs(p - (asked if m.dims == 3 else asked[:, 1])).max() < 1e-5
    for size, m in (((64, 64), model), ((61, 50), model), ((64, 64), others["xlearn"])):
        maps = activations(m, grey[:, :size[0], :size[1]])
        assert list(maps)[-1] == "logits" and maps["logits"].shape[1:] == (size if m is model else (32, 32)) and maps["down_2"].shape[1:] == tuple(-(-n//2) for n in maps["logits"].shape[1:])
        assert float(maps["down_2"].y[0]) == pytest.approx(float(maps["logits"].y[:2].mean())) and maps["down_2"].y.attrs["units"] == "µm"
    assert len(draw_activations(maps, 3).axes) == 3*len(maps)


def test_a_network_made_by_hand_shows_the_image(case, model):
    by_hand = untrained(model)
    with torch.no_grad():
        for conv, norm in (by_hand.network_.down[0][0:2], by_hand.network_.down[0][3:5]):
            conv.weight.zero_(); conv.bias.zero_(); conv.weight[0, 1 if conv.in_channels == 3 else 0, 1, 1] = 1 # channel 0 passes the slice on
            norm.eps = 0
    first = activations(by_hand, case[0], z=3)["down_1"]
    assert np.allclose(first[0], np.maximum(_normalized(case[0].values[3], model.center_, model.scale_), 0), atol=1e-6) and first.attrs["silent"] == len(first) - 1


@pytest.mark.parametrize("name, z", [("model", 2), ("model", 0), ("segnet", 2), ("deep", 1), ("xlearn", 2)])
def test_gradient_is_the_slope_of_the_log_odds(case, model, others, name, z):
    grey, m = case[0], model if name == "model" else others[name]
    at = (14, 17) if name == "xlearn" else (30, 9)
    g = input_gradient(m, grey, at, "solid", z=z)
    if name == "xlearn": grey = grey[:, 16:48, 16:48] # the middle patch
    assert g.dims == grey.dims and g.shape == grey.shape and np.abs(g.values).max() > 0 and history(g)[-1]["function"].endswith("input_gradient")
    direction = np.sign(g.values)*(np.abs(g.values) > (.99 if name == "segnet" else .3)*np.abs(g.values).max()) # segnet jumps where another pixel becomes the largest
    odds = [input_gradient(m, grey + s*direction.astype("f4"), at, "solid", z=z).attrs["log_odds"] for s in (-2e-3, 2e-3)]
    assert (odds[1] - odds[0])/4e-3 == pytest.approx(float((g.values*direction).sum()), rel=.1), name
    p = activations(m, grey, z=z)["logits"].values
    there = p[(slice(None), *((z,) if m.dims == 3 else ()), *at)]
    assert g.attrs["log_odds"] == pytest.approx(there[1] - there[0], abs=1e-4)


def test_gradient_stays_inside_the_reach(model, others):
    wide = phantom(3, (8, 160, 168))[0]
    for m in (model, others["segnet"], others["deep"]):
        g = input_gradient(m, wide, (80, 84), "solid", z=2)
        far = np.abs(np.indices(wide.shape[1:]) - np.array([80, 84])[:, None, None]).max(0)
        assert (g.values[:, far > g.attrs["reach"]] == 0).all() and (far > g.attrs["reach"]).any()
        assert 1 < g.attrs["radius90"] < g.attrs["reach"]
        inside = np.abs(g.values[:, far <= g.attrs["radius90"]]).sum()/np.abs(g.values).sum()
        assert .75 < inside <= 1 # a square around the circle holds a little more or less
        if m.dims == 2: assert (g.values[[0, *range(4, 8)]] == 0).all() and (np.abs(g.values[[1, 2, 3]]).sum((1, 2)) > 0).all() # the slice and its neighbors
    assert draw_gradient(g, wide).axes[1].get_title().startswith("why solid")


def test_gradient_norms(case, model):
    grey, _, marks = case
    norms = gradient_norms(model, grey, marks, ignore=255, batches=2, seed=4)
    net = copy.deepcopy(model.network_).train()
    stroke_loss(net, *training_batches(model, grey, marks, ignore=255, batches=2, seed=4)[0]).backward()
    assert float(norms.gradient.sel(layer="down.1.3")[0]) == pytest.approx(float(net.down[1][3].weight.grad.norm()), rel=1e-4)
    assert float(norms.weight.sel(layer="out")) == pytest.approx(float(net.out.weight.detach().norm()), rel=1e-5)
    ill = untrained(model)
    with torch.no_grad(): ill.network_.up[0][4].weight.mul_(1e-3); ill.network_.up[0][4].bias.mul_(1e-3)
    cut, whole = (gradient_norms(m, grey, marks, ignore=255, batches=1) for m in (ill, untrained(model)))
    ratio = (cut.gradient/whole.gradient).isel(batch=0)
    assert (ratio.sel(layer=["down.2.0", "down.2.3", "up.0.0"]) < .01).all() and ratio.sel(layer="down.0.0") > .1 and cut.attrs["spread"] > 20*whole.attrs["spread"]
    assert len(draw_norms({"a": cut, "b": whole}).axes) == 2


def test_landscape(case, model):
    grey, _, marks = case
    d = loss_landscape(model, grey, marks, ignore=255, batches=2, steps=5, progress=False)
    batches = training_batches(model, grey, marks, ignore=255, batches=2)
    with torch.no_grad(): loss = np.mean([float(stroke_loss(model.network_, *b)) for b in batches])
    assert d.attrs["center"] == float(d.sel(a=0, b=0)) == loss == mean_loss(model.network_, batches)
    assert loss < 1.5*d.attrs["lowest"] and max(map(abs, d.attrs["lowest_at"])) <= .5 and float(d.max()) > 3*loss # a trained network lies in a valley
    one, two = (filter_direction(model.network_, 0, k) for k in "ab")
    moved = copy.deepcopy(model.network_)
    with torch.no_grad():
        for k, p in moved.named_parameters(): p.add_(-.5*one[k] + 1.0*two[k])
    assert float(d.sel(a=-.5, b=1)) == pytest.approx(mean_loss(moved, batches), rel=1e-5)
    again = loss_landscape(model, grey, marks, ignore=255, batches=2, steps=5, progress=False)
    assert np.array_equal(again, d) and not np.array_equal(loss_landscape(model, grey, marks, ignore=255, batches=2, steps=3, seed=1, progress=False), d[::2, ::2])
    assert draw_landscape(d).axes[0].get_xlabel()
    with pytest.raises(BattError, match="odd"): loss_landscape(model, grey, marks, ignore=255, steps=6)


def test_landscape_does_not_depend_on_the_size_of_a_layer(case, model):
    "A convolution ten times larger before a normalization is the same network: the same picture (Li et al. 2018)."
    grey, _, marks = case
    large = copy.copy(model)
    large.network_ = copy.deepcopy(model.network_)
    conv, norm = large.network_.down[1][3:5]
    with torch.no_grad(): conv.weight.mul_(10); conv.bias.mul_(10); norm.running_mean.mul_(10); norm.running_var.add_(norm.eps).mul_(100).sub_(norm.eps)
    one, two = (loss_landscape(m, grey, marks, ignore=255, batches=1, steps=3, progress=False) for m in (model, large))
    assert np.allclose(one, two, rtol=2e-3)
    lengths = filter_direction(large.network_, 0, "a")["down.1.3.weight"].flatten(1).norm(dim=1)
    assert torch.allclose(lengths, conv.weight.detach().flatten(1).norm(dim=1)) and not filter_direction(model.network_, 0, "a")["down.1.3.bias"].any()


def test_agreement_counts_other_strokes_only():
    r = np.random.default_rng(0)
    strokes = np.repeat(np.arange(40), 10)
    kinds = np.repeat(r.permutation(np.resize([0, 1], 40)), 10)
    islands = np.repeat(r.normal(size=(40, 6)), 10, 0)*10 + r.normal(size=(400, 6)) # each stroke an island, wherever
    assert neighbor_agreement(islands, kinds, np.arange(400)) > .9 # what a picture seems to say
    assert abs(neighbor_agreement(islands, kinds, strokes) - .5) < .12 # by chance
    assert neighbor_agreement(islands + 100*kinds[:, None], kinds, strokes) == 1
    assert np.isnan(neighbor_agreement(islands[:10], kinds[:10], strokes[:10]))


def test_embedding(case, model, others):
    grey, _, marks = case
    ds = embed(model, grey, marks, ignore=255, most=120)
    fresh = embed(untrained(model), grey, marks, ignore=255, most=120)
    assert ds.attrs["agreement"] > .9 > ds.attrs["chance"] + .3 and ds.attrs["agreement"] > fresh.attrs["agreement"] and ds.attrs["silhouette"] > fresh.attrs["silhouette"] + .1
    assert ds.attrs["chance"] == pytest.approx(.5, abs=.05) and ds.place.shape == (ds.sizes["pixel"], 2) and ds.sizes["pixel"] <= 120
    _, z, y, x = ds["at"].values[7]
    assert np.allclose(ds.features[7], activations(model, grey, z=z)["up_2"].values[:, y, x], atol=1e-6) and int(marks[z, y, x]) == CODES[str(ds.kind.values[7])]
    logits = activations(model, grey, z=z)["logits"]
    assert str(ds.found.values[7]) == str(logits.channel.values[logits.values[:, y, x].argmax()])
    again = embed(model, grey, marks, ignore=255, most=120)
    assert np.array_equal(again.place, ds.place)
    deep = embed(model, grey, marks, ignore=255, most=60, layer="deepest")
    _, z, y, x = deep["at"].values[3]
    assert np.allclose(deep.features[3], activations(model, grey, z=z)["down_3"].values[:, y//4, x//4], atol=1e-6)
    assert embed(others["deep"], grey, marks, ignore=255, most=60).sizes["feature"] == 2
    with pytest.raises(BattError, match="XLearn"): embed(others["xlearn"], grey, marks, ignore=255)
    assert "agreement" in draw_embedding({"one": ds}).axes[0].get_title()


def test_errors(case, model):
    grey, _, marks = case
    forest = Segmenter(CODES, network="forest", trees=3, progress=False).fit(grey, marks, ignore=255)
    for call, key in ((lambda: activations(forest, grey), "segmenter"), (lambda: activations(model, grey[0]), "image"), (lambda: activations(model, grey, z=8), "z"), (lambda: input_gradient(model, grey, (1, 1), "gold"), "of"),
                      (lambda: input_gradient(model, grey, (1, 64), "pore"), "at"), (lambda: gradient_norms(model, grey, marks[:2], ignore=255), "labels"), (lambda: gradient_norms(model, grey, marks, ignore=[255, 10, 30]), "labels"),
                      (lambda: embed(model, grey, marks, ignore=255, layer="middle"), "layer")):
        with pytest.raises(BattError) as e: call()
        assert e.value.key == key and e.value.mend


def test_strokes_to_choose_by_are_left_out_whole(case):
    marks = case[2]
    known, chosen, none = split_strokes(marks, CODES, ignore=255, share=.3, seed=1)
    ids, kinds = find_strokes(encode(marks.values, CODES, 255)[None])
    away = np.unique(ids[0][chosen.values != none])
    assert len(away) and np.isin(ids[0], away)[marks.values != 255].sum() == (chosen != none).sum() and ((known != none) ^ (chosen != none)).equals(marks != 255)
    assert all(0 < np.isin(away, np.flatnonzero(kinds == c)).sum() < (kinds == c).sum() for c in range(2)) and known.dims == marks.dims
    assert (known.values[known.values != none] == marks.values[known.values != none]).all()
    other = split_strokes(marks.transpose("x", "z", "y"), CODES, ignore=255, share=.3, seed=1)[1]
    assert other.transpose("z", "y", "x").equals(chosen) and not split_strokes(marks, CODES, ignore=255, share=.3, seed=2)[1].equals(chosen)
    alone = marks.copy(data=np.where((marks == 30) & (np.arange(8)[:, None, None] > 2), 255, marks))
    alone.values[2][alone.values[2] == 30] = 255; alone.values[2, 5, 5:8] = 30
    with pytest.raises(BattError, match="solid"): split_strokes(alone, CODES, ignore=255)


def test_scores_of_strokes():
    p = np.array([[.9, .1], [.9, .1], [.5, .5], [.2, .8], [.6, .4]])
    y, strokes = np.array([0, 0, 0, 1, 1]), np.array([4, 4, 7, 9, 9])
    mean, sigma = log_likelihood(p, y, strokes)
    assert mean == pytest.approx(((np.log(.9) + np.log(.5))/2 + (np.log(.8) + np.log(.4))/2)/2) and np.isnan(sigma) # one stroke of a class: unknown
    r = np.random.default_rng(0) # the standard error is that of drawing other strokes
    def draw():
        y = np.repeat([0, 1], 15*8)
        good = np.clip(np.repeat(r.beta(6, 2, 30), 8) + .05*r.normal(size=240), .01, .99)
        return log_likelihood(np.where(y[:, None] == [0, 1], good[:, None], 1 - good[:, None]), y, np.repeat(np.arange(30), 8))
    found = np.array([draw() for _ in range(200)])
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=.2)
    mean, sigma = mean_iou(np.array([0, 0, 1, 1, 0]), y, strokes)
    assert mean == pytest.approx((2/4 + 1/3)/2) and sigma > 0


def test_sweep_of_a_segmenter(case, tmp_path, monkeypatch):
    grey, truth, marks = case
    fits, real = [], Segmenter.fit
    def watched(self, images, labels, **options):
        fits.append((self.trees, labels, options["ignore"]))
        return real(self, images, labels, **options)
    monkeypatch.setattr(segmenter_sweeps.Segmenter, "fit", watched)
    options = dict(ignore=255, network="forest", context=0, seed=3, progress=False)
    trials, best = sweep_segmenter(CODES, grey, marks, {"trees": (1, 100)}, trials=6, folder=tmp_path, method="random", **options)
    known, chosen, none = split_strokes(marks, CODES, ignore=255, seed=3)
    assert fits[0][0] == 100 == int(trials.trees[0]) and len(fits) == 7 # the default first, the winner again
    for _, labels, ignore in fits[:-1]: assert (labels.values[chosen.values != none] == ignore).all() and (labels.values[known.values != none] != ignore).all()
    assert fits[-1][1].equals(marks) and best.trees == int(trials.trees.sel(trial=trials.attrs["best_trial"]))
    assert trials.attrs["best_value"] == trials.value.max() >= trials.value[0] and (trials.score_sigma > 0).all() and "Log-likelihood" in trials.value.attrs["long_name"]
    again = Segmenter(CODES, trees=100, **{k: v for k, v in options.items() if k != "ignore"}); real(again, grey, known, ignore=none)
    assert stroke_score(again, grey, chosen, ignore=none)[0] == pytest.approx(float(trials.value[0]), rel=1e-6)
    assert (best.predict(grey).label == truth).mean() > .9
    with pytest.raises(BattError, match="another sweep"): sweep_segmenter(CODES, grey + 1, marks, {"trees": (1, 100)}, trials=6, folder=tmp_path, method="random", **options)
    more, _ = sweep_segmenter(CODES, grey, marks, {"trees": (1, 100)}, trials=7, folder=tmp_path, method="random", **options)
    assert np.array_equal(more.value[:6], trials.value) and len(fits) == 9 and read_sweep(tmp_path).sizes["trial"] == 7


def test_only_slices_near_labels_are_read(case, model):
    grey, marks = (da[:, 8:48, 8:48] for da in (case[0], case[2]))
    tall = xr.concat([grey[::-1], grey, grey[::-1], grey, grey[::-1], grey, grey, grey[::-1]], "z").assign_coords(z=np.arange(64)*.5) # 64 slices
    lines = tall.copy(data=np.full(tall.shape, 255, "u1"))
    lines[42:45] = marks.values[3:6]
    forest = Segmenter(CODES, network="forest", trees=5, adapt=False, progress=False).fit(grey, marks, ignore=255)
    for m in (model, forest):
        p = m.predict(tall).probability.values[:, lines.values != 255].T # the prior is even: no adapt
        y = encode(lines.values, CODES, 255)[lines.values != 255].astype(int)
        strokes = find_strokes(encode(lines.values, CODES, 255)[None])[0][0][lines.values != 255]
        assert stroke_score(m, tall, lines, ignore=255) == pytest.approx(log_likelihood(p, y, strokes), rel=1e-4)
    part = segmenter_sweeps._near(model, tall, lines, 255)
    assert part[0].sizes["z"] == 48 and part[2] == 16 and part[1].equals(lines[16:])
    assert set(embed(model, tall, lines, ignore=255, most=40)["at"].values[:, 1]) <= {42, 43, 44}


def test_other_images_to_choose_by_and_settings_that_fail(case):
    grey, _, marks = case
    new, truth, _ = phantom(1)
    options = dict(ignore=255, valid_images=new, valid_labels=truth, score="miou", context=0, trees=10, epochs=1, steps=1, width=2, depth=1, crop=16, turns=1, progress=False)
    trials, best = sweep_segmenter(CODES, grey, marks, {"network": ["forest"], "context": [0, 1]}, method="grid", **{k: v for k, v in options.items() if k != "context"})
    found = best.predict(new).label.values
    exact = np.mean([((found == c) & (truth.values == c)).sum()/((found == c) | (truth.values == c)).sum() for c in CODES.values()])
    assert trials.attrs["best_value"] == pytest.approx(exact, abs=1e-6) # no stroke was needed to choose by: the fit is the same
    flat, _ = sweep_segmenter(CODES, grey[3:6], marks[3:6], {"dims": [2, 3]}, method="grid", **options | {"valid_images": new[3:6], "valid_labels": truth[3:6]})
    assert flat.state.values.tolist() == ["complete", "failed"] and "too small" in str(flat.error.values[1])
    for bad, key in ((dict(space={"widht": [4]}), "widht"), (dict(space={"trees": [4]}), "trees"), (dict(score="dice"), "score"), (dict(valid_labels=None), "valid_labels")):
        with pytest.raises(BattError) as e: sweep_segmenter(CODES, grey, marks, **{"space": {"batch": [4]}} | options | bad)
        assert e.value.key == key
