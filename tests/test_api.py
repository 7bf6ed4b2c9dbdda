"""The front door on networks it has never seen, and everything it refuses."""

import copy
import json
import random
from dataclasses import replace

import numpy
import pytest
import torch
from recipes import changed
from torch import nn

import zsq_ext as zsq
from zsq_ext import api, methods
from zsq_ext.core.progress import QUIET, Progress
from zsq_ext.methods import synq
from zsq_ext.ops import backend
from zsq_ext.quant.modules import activation_quantizers
from zsq_ext.synth.generate import GeneratorConfig
from zsq_ext.synth.pixels import PixelConfig
from zsq_ext.tune.finetune import TuneConfig
from zsq_ext.tune.ideas import CamAlign, FeatureAlign, LowPass, SoftLabels

QUICK = changed(
    synq.config("smoke", "repo"),
    images=8,
    held_out=4,
    pixels=PixelConfig(batch=6, iterations=5, lr=0.2),
    generator=GeneratorConfig(batch=4),
    generator_steps=3,
    range_steps=3,
    range_batch=4,
    finetune=TuneConfig(epochs=2, steps_per_epoch=2, batch=4, lr=1e-5),
)
NO_TUNING = replace(QUICK.tune.finetune, epochs=0)


def quantize(model, method="synq", shape=(3, 8, 8), **more):
    given = {"w_bits": 4, "a_bits": 4, "input_shape": shape, "config": QUICK, "progress": QUIET, **more}
    if "preset" in more:
        del given["config"]
    return zsq.quantize(model, method, **given)


def same_state(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def model(nets):
    return nets.residual()


@pytest.fixture(scope="module")
def result(model):
    return quantize(model)


@pytest.mark.parametrize(
    ("kind", "shape", "classes"),
    [
        ("residual", (1, 28, 28), 10),
        ("residual", (3, 64, 48), 3),
        ("vgg", (3, 16, 16), 7),
    ],
)
def test_networks_never_seen(nets, tmp_path, kind, shape, classes):
    model = getattr(nets, kind)(shape, classes, seed=5)
    result = quantize(model, shape=shape, num_classes=classes)
    images = torch.randn(3, *shape)
    logits = result.model(images)
    assert logits.shape == (3, classes)
    assert not torch.equal(logits, model(images))
    assert result.images.shape == (8, *shape)
    assert result.labels.shape == (8,)
    assert result.spec.num_classes == classes
    result.save(tmp_path / "m.safetensors")
    other = getattr(nets, kind)(shape, classes, seed=6)
    loaded = zsq.load(tmp_path / "m.safetensors", other)
    assert same_state(loaded, result.model)
    assert torch.equal(loaded(images), result.model(images))


def test_the_callers_model_is_not_touched(nets):
    model = nets.residual().train()
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    model.head.weight.requires_grad_(False)
    model.convs[1].register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model)
    hooks = [dict(layer._forward_hooks) for layer in model.modules()]
    gradients = [p.grad.clone() for p in model.parameters()]
    layouts = [p.stride() for p in model.parameters()]
    quantize(model)
    assert same_state(model, before)
    assert [dict(layer._forward_hooks) for layer in model.modules()] == hooks
    assert all(layer.training for layer in model.modules())
    assert [p.stride() for p in model.parameters()] == layouts
    for (name, now), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert now.requires_grad == (name != "head.weight")
        assert torch.equal(now.grad, gradient)


@pytest.mark.parametrize("ranges", ["images", "generator"])
def test_the_same_seed_is_the_same_result_and_global_streams_are_not_used(model, ranges):
    config = changed(QUICK, ranges=ranges, pixels=replace(QUICK.images.pixels, crop_probability=0.5))
    torch.manual_seed(1)
    before = torch.random.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    one = quantize(model, config=config)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy.random.get_state()[1].tolist() == before[2]
    torch.manual_seed(2)
    two = quantize(model, config=config)
    assert same_state(one.model, two.model)
    assert torch.equal(one.images, two.images)
    assert one.histories == two.histories
    assert one.quality == two.quality
    other = quantize(model, config=config, seed=1)
    assert not torch.equal(one.images, other.images)
    assert not same_state(one.model, other.model)


def test_what_a_result_holds(model, result):
    assert result.quality.images == 4
    assert 0 <= result.quality.agreement <= 100
    assert result.quality.kl >= 0
    kinds = [layer.kind for layer in result.quality.layers]
    assert kinds.count("weight") == 5  # four convolutions and the head
    assert kinds.count("activation") == 4
    assert result.qconfig.label == "W4A4"
    assert [row["step"] for row in result.histories["tuning"]] == [4]
    assert set(result.histories["tuning"][0]) >= {"kd", "ce", "fa", "cam", "kd_perturbed"}
    assert result.evaluations == []
    assert result.top1_last is None
    assert result.top1_best is None
    assert result.seconds > 0
    assert json.loads(json.dumps(result.config)) == result.config
    for copied in (copy.deepcopy(result.model), result.model.train(), result.model.eval()):
        assert torch.equal(copied(result.images), result.model(result.images))
    assert all(p.requires_grad for p in result.model.parameters())


def test_test_data_gives_last_and_best_and_decides_nothing(model, result):
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    tested = quantize(model, test=lambda: [(images, labels), (images[:3], labels[:3])])
    assert same_state(tested.model, result.model)
    assert [row["epoch"] for row in tested.evaluations] == [1, 2]
    batches = [(images, labels), (images[:3], labels[:3])]
    assert tested.top1_last == zsq.evaluate(tested.model, batches)
    hits = tested.model(images).argmax(1) == labels
    assert tested.top1_last == pytest.approx(100 * (hits.sum() + hits[:3].sum()).item() / 11)
    assert tested.top1_best == max(row["top1"] for row in tested.evaluations)
    with pytest.raises(ValueError, match="evaluate: batches must hold at least one image, got none"):
        zsq.evaluate(tested.model, [])


def test_a_resumed_run_is_measured_on_what_it_is_given_now(model, tmp_path):
    first, second = ((torch.randn(8, 3, 8, 8), torch.arange(8) % n) for n in (5, 2))
    before = quantize(model, out=tmp_path, test=lambda: [first])
    after = quantize(model, out=tmp_path, resume=True, test=lambda: [second])
    assert [row["epoch"] for row in before.evaluations] == [1, 2]
    assert after.evaluations == [{"epoch": 2, "top1": zsq.evaluate(after.model, [second])}]
    assert quantize(model, out=tmp_path, resume=True, test=lambda: [first]).evaluations == before.evaluations
    assert quantize(model, out=tmp_path, resume=True).evaluations == before.evaluations


def halves(network, batches):
    """A measure that is none of ours: the share of positive logits, and of images."""
    logits = torch.cat([network(images) for images, _ in batches])
    return {"positive": 100 * (logits > 0).float().mean().item(), "all": 100.0}


def test_a_measure_of_the_users_own(model, tmp_path):
    images = torch.randn(8, 3, 8, 8)
    measured = quantize(model, out=tmp_path, test=lambda: [(images, {"any": ["thing"]})], measure=halves)
    assert measured.accuracy == halves(measured.model, [(images, None)])
    assert measured.teacher_accuracy == halves(model, [(images, None)])
    assert [row.keys() for row in measured.evaluations] == [{"epoch", "positive", "all"}] * 2
    assert (measured.top1_last, measured.top1_best, measured.teacher_top1) == (None, None, None)
    assert measured.best_accuracy["positive"] == max(row["positive"] for row in measured.evaluations)
    assert f", positive {measured.accuracy['positive']:.2f} %, all 100.00 %, " in repr(measured)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["accuracy"] == measured.accuracy
    assert record["teacher_accuracy"] == measured.teacher_accuracy
    # the same labels by another measure are another evaluation
    other = quantize(
        model, out=tmp_path, resume=True, test=lambda: [(images, {"any": ["thing"]})], measure=lambda *_: {"one": 1.0}
    )
    assert other.evaluations == [{"epoch": 2, "one": 1.0}]
    assert other.seconds == measured.seconds


def test_a_network_is_measured_in_eval_mode_and_without_gradients(model):
    net, seen = copy.deepcopy(model).train(), []

    def look(network, batches):
        images, _ = next(iter(batches))
        seen.append((network.training, network(images).requires_grad, images.is_contiguous()))
        return {"it": 1.0}

    assert api.measured(net, [(X, Y)], look) == {"it": 1.0}
    assert seen == [(False, False, False)]  # channels last
    assert net.training


def test_dfq_says_of_each_site_what_rounding_cost_and_not_what_was_rewritten(model):
    result = quantize(model, "dfq", preset="smoke", w_bits=8, a_bits=8, placement="academic")
    weights = {layer.site: layer.sqnr_db for layer in result.quality.layers if layer.kind == "weight"}
    for site, found in weights.items():
        latent = result.model.get_parameter(site).detach().double()  # as it was rewritten
        noise = result.model.get_submodule(f"quantizers.{site.replace('.', '_')}")(latent.float()).double() - latent
        assert found == pytest.approx(10 * torch.log10(latent.square().sum() / noise.square().sum()).item()), site
    assert result.quality.rewritten
    assert result.quality.to_dict()["rewritten"] is True
    assert "by layer, against the rewritten float network: SQNR in place" in str(result.quality)
    assert result.images.shape == (0, 3, 8, 8)
    assert result.figures.layers == ()
    assert repr(result).startswith("Result(dfq W8A8, weights equalised, biases corrected, agreement ")


def test_quality_says_when_nothing_was_held_out(model):
    images = torch.randn(7, 3, 8, 8)
    held = quantize(model, images=images)
    assert (held.quality.images, held.quality.unseen, len(held.images)) == (1, True, 6)
    alone = zsq.synthesize(model, "noise", input_shape=(3, 8, 8), config=changed(QUICK, held_out=0), progress=QUIET)
    flattered = quantize(model, images=alone)
    assert (flattered.quality.images, flattered.quality.unseen) == (8, False)
    assert flattered.quality.to_dict()["unseen"] is False


def test_range_rules_reach_the_quantizers(model):
    result = quantize(model, "minmax", a_range="minmax", w_range="lp", config=changed(QUICK, finetune=NO_TUNING))
    assert {quantizer.range_kind for quantizer in activation_quantizers(result.model)} == {"minmax"}
    assert result.qconfig.w_range == "lp"


def test_weights_only(model):
    result = quantize(model, a_bits=None)
    assert activation_quantizers(result.model) == []
    assert result.qconfig.label == "W4"
    assert result.histories["ranges"] == []
    assert {layer.kind for layer in result.quality.layers} == {"weight"}


def test_no_tuning_leaves_the_teachers_weights(model):
    result = quantize(model, tune="none")
    own = dict(model.named_parameters())
    for name, value in result.model.named_parameters():
        assert torch.equal(value, own[name]), name
    assert result.histories["tuning"] == []


def test_ideas_are_added_or_replace_the_methods_own(model, result):
    def ideas(result):
        return {row["idea"]: row for row in result.config["hyperparameters"]["tune"]["distill"]["ideas"]}

    assert set(ideas(result)) == {"LowPass", "CamAlign", "SoftLabels", "FeatureAlign", "Perturb"}
    moved = quantize(model, ideas=(LowPass(d0=2.0), CamAlign(0)))
    assert ideas(moved)["LowPass"]["d0"] == 2.0
    assert "cam" not in moved.histories["tuning"][0]
    plain = changed(QUICK, distill=replace(QUICK.tune.distill, ideas=()))
    added = quantize(model, config=plain, ideas=SoftLabels(0.3))
    assert list(ideas(added)) == ["SoftLabels"]
    with pytest.raises(TypeError, match=r"quantize: ideas must be instances of LowPass, .*, got 'LowPass'"):
        quantize(model, ideas=("LowPass",))


@pytest.mark.parametrize("profile", ["repo", "paper", None])
def test_preset_and_profile_are_part_of_the_record(model, monkeypatch, tmp_path, profile):
    """With the presets' sizes cut down, so that the run is short; everything else is theirs."""

    def small(preset, profile):
        config = synq.config(preset, profile)
        sizes = {name: getattr(QUICK.images, name) for name in ("images", "held_out", "pixels")}
        centres = replace(config.images.centre_pixels, iterations=3)
        tuning = replace(config.tune.finetune, epochs=1, steps_per_epoch=2, batch=4)
        generator = QUICK.tune.generator
        return changed(config, **sizes, centre_pixels=centres, generator=generator, finetune=tuning)

    monkeypatch.setitem(methods.METHODS, "synq", replace(methods.METHODS["synq"], config=small))
    result = quantize(model, preset="cifar", profile=profile, out=tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert record == result.config
    assert record["preset"] == "cifar"
    assert record["profile"] == (profile or "repo")
    assert record["hyperparameters"]["images"]["bns_form"] == ("mean_std" if profile == "paper" else "mean_var")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_configuration_by_hand_is_no_preset(result):
    assert (result.config["method"], result.config["preset"], result.config["profile"]) == ("synq", None, None)


def test_images_of_the_users_own(nets, model):
    images, labels = torch.randn(24, 3, 8, 8), torch.arange(24) % 5
    kept = images.clone()
    result = quantize(model, images=images, labels=labels, config=changed(QUICK, ranges="generator"))
    assert result.images.shape == (21, 3, 8, 8)  # an eighth is held out
    assert result.quality.images == 3
    assert torch.equal(images, kept)
    where = [int((image == images).flatten(1).all(1).nonzero()) for image in result.images]
    assert len(set(where)) == 21
    assert where != sorted(where)  # at random: sets come sorted by label
    assert torch.equal(result.labels, labels[where])
    assert result.histories["images"] == []
    predicted = quantize(model, images=images, tune="none")
    assert torch.equal(predicted.labels, model(predicted.images).argmax(1))
    # without batch norm there is nothing to make images from, and nothing for feature alignment to compare
    bare = nets.vgg(norm=False)
    assert quantize(bare, images=images, ideas=FeatureAlign(0)).images.shape == (21, 3, 8, 8)


def test_synthesize_then_quantize(model, tmp_path):
    made = zsq.synthesize(model, "synq", input_shape=(3, 8, 8), config=QUICK, out=tmp_path, progress=QUIET)
    assert made.images.shape == (8, 3, 8, 8)
    assert made.held_out.shape == (4, 3, 8, 8)
    result, direct = quantize(model, images=made), quantize(model)
    assert torch.equal(result.images, direct.images)
    assert same_state(result.model, direct.model)
    assert result.quality == direct.quality
    assert (tmp_path / "images.safetensors").exists()


def test_a_device_by_name(model, result):
    assert same_state(quantize(model, device="cpu").model, result.model)
    assert same_state(quantize(model, device=torch.device("cpu")).model, result.model)
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(ValueError, match=f"^quantize: device must be one that torch can use here, got '{device}'"):
            quantize(model, device=device)


def test_a_run_folder_belongs_to_one_run(model, result, tmp_path):
    out = tmp_path / "run"
    first = quantize(model, out=out)
    assert same_state(first.model, result.model)
    loaded = zsq.load(out / "model.safetensors", model)
    assert same_state(loaded, first.model)
    record = json.loads((out / "result.json").read_text())
    assert record["quality"]["agreement"] == first.quality.agreement
    with pytest.raises(ValueError, match=r"^quantize: out must be a new folder unless the run in it is to go on"):
        quantize(model, out=out)
    with pytest.raises(ValueError, match=r"^quantize: out must be a new folder or hold this run.*w_bits is 4 there"):
        quantize(model, out=out, w_bits=3, resume=True)
    with pytest.raises(ValueError, match=r"^quantize: out must be .* model is '\w+' there and '\w+' here"):
        quantize(nn.Sequential(model, nn.Linear(5, 5)), out=out, resume=True)
    again = quantize(model, out=out, resume=True)
    assert same_state(again.model, first.model)
    assert torch.equal(again.images, first.images)
    assert again.histories == first.histories


def test_a_damaged_checkpoint_is_an_error(model, tmp_path):
    out = tmp_path / "run"
    quantize(model, out=out)
    path = out / "images-0.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"images-0.safetensors must be a complete safetensors file, but: "):
        quantize(model, out=out, resume=True)
    path.write_bytes(whole.replace(b"digest", b"digesu"))
    with pytest.raises(ValueError, match=r"images-0.safetensors must belong to this run, got one of another"):
        quantize(model, out=out, resume=True)


class Picky(nn.Module):
    """Wants 8 x 8 images."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(192, 5)

    def forward(self, x):
        return self.fc(self.norm(x).flatten(1))


def poisoned(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.norms[1].running_var[3] = float("nan")
    return model


X, Y = torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64)
REFUSED = {
    "method": ({"method": "magic"}, ValueError, "method must be one of synq, hast, .*, got 'magic'"),
    "preset": ({"preset": "huge"}, ValueError, "preset must be one of smoke, cifar, imagenet, got 'huge'"),
    "profile": ({"preset": "smoke", "profile": "mct"}, ValueError, "profile must be one of repo, paper, got 'mct'"),
    "profile of another method": (
        {"method": "hast", "preset": "smoke", "profile": "paper"},
        ValueError,
        "profile must be one of repo, got 'paper'",
    ),
    "tune": ({"tune": "brecq2"}, ValueError, "tune must be one of qat, brecq, .*, none, got 'brecq2'"),
    "nothing to tune": (
        {"method": "minmax", "preset": "smoke", "tune": "qat"},
        ValueError,
        "tune must be left out or 'none' where the method tunes nothing, got 'qat'",
    ),
    "a_range": ({"a_range": "max"}, ValueError, "a_range must be one of ema, legacy_ema, minmax, lp, got 'max'"),
    "ideas by name": ({"ideas": "LowPass"}, TypeError, r"ideas must be a tuple of ideas such as .*, got 'LowPass'"),
    "config empty": ({"config": {}}, TypeError, "config must be a Recipe, got dict"),
    "config": ({"config": {"images": 3}}, TypeError, "config must be a Recipe, got dict"),
    "w_bits low": ({"w_bits": 1}, ValueError, "w_bits must be an integer from 2 to 8, got 1"),
    "w_bits high": ({"w_bits": 9}, ValueError, "w_bits must be an integer from 2 to 8, got 9"),
    "w_bits none": ({"w_bits": None}, ValueError, "w_bits must be an integer from 2 to 8, got None"),
    "a_bits float": ({"a_bits": 4.0}, ValueError, "a_bits must be an integer from 2 to 8, got 4.0"),
    "a_bits true": ({"a_bits": True}, ValueError, "a_bits must be an integer from 2 to 8, got True"),
    "edge_bits": ({"edge_bits": 16}, ValueError, "edge_bits must be an integer from 2 to 8, got 16"),
    "placement": ({"placement": "all"}, ValueError, "placement must be one of .*, got 'all'"),
    "sites": (
        {"sites": {"convs.0": 8}},
        ValueError,
        r"sites must name sites of the network, got 'convs.0'; close to it: convs.0.weight",
    ),
    "sites without a clue": (
        {"sites": {"?": 8}},
        ValueError,
        r"sites must name sites of the network, got '\?'; they are convs.0.weight, .*\(\d+ in all\)",
    ),
    "num_classes": ({"num_classes": 10}, ValueError, "num_classes must be the model's 5 outputs, got 10"),
    "no shape": ({"shape": None}, ValueError, r"input_shape must be three .* unless input_spec is given, got None"),
    "two axes": ({"shape": (8, 8)}, ValueError, r"input_shape must be three positive integers .*, got \(8, 8\)"),
    "zero": ({"shape": (3, 0, 8)}, ValueError, r"input_shape must be three positive integers .*, got \(3, 0, 8\)"),
    "a number": ({"shape": 8}, ValueError, r"input_shape must be three positive integers .*, got 8"),
    "both shapes": (
        {"input_spec": zsq.InputSpec((3, 8, 8))},
        ValueError,
        "input_shape must be left out where input_spec is given, got both",
    ),
    "input_spec": ({"shape": None, "input_spec": (3, 8, 8)}, TypeError, "input_spec must be an InputSpec, got tuple"),
    "channels": (
        {"shape": (4, 8, 8)},
        ValueError,
        r"the model rejects an input of shape \(2, 4, 8, 8\) in module 'convs.0' \(Conv2d\): ",
    ),
    "seed": ({"seed": "0"}, TypeError, "seed must be an integer, got '0'"),
    "labels alone": ({"labels": Y}, ValueError, "labels must come with images, got labels alone"),
    "images shape": (
        {"images": X[0]},
        ValueError,
        r"images must have shape \(N, 3, 8, 8\) .*, got \(3, 8, 8\)",
    ),
    "images size": ({"images": X[..., :4]}, ValueError, r"images must have shape .*, got \(8, 3, 8, 4\)"),
    "no images": ({"images": X[:0]}, ValueError, r"images must have shape .*, got \(0, 3, 8, 8\)"),
    "images dtype": ({"images": X.byte()}, TypeError, "images must be a float32 tensor .*, got torch.uint8"),
    "images array": ({"images": X.numpy()}, TypeError, "images must be a float32 tensor .*, got ndarray"),
    "images nan": ({"images": X * float("nan")}, ValueError, "images must be finite, got NaN or infinity"),
    "labels dtype": (
        {"images": X, "labels": Y.float()},
        TypeError,
        "labels must be an int64 .*, got torch.float32",
    ),
    "labels list": ({"images": X, "labels": [0] * 8}, TypeError, "labels must be an int64 tensor, got list"),
    "labels shape": ({"images": X, "labels": Y[:7]}, ValueError, r"labels must have shape \(8,\), got \(7,\)"),
    "labels range": ({"images": X, "labels": Y + 5}, ValueError, r"labels must be in \[0, 5\), got 5 to 5"),
    "labels negative": ({"images": X, "labels": Y - 1}, ValueError, r"labels must be in \[0, 5\), got -1 to -1"),
    "test no function": ({"test": [(X, Y)]}, TypeError, "test must be a function that gives batches, got list"),
    "test empty": ({"test": list}, ValueError, "test must give at least one batch at every call, got none"),
    "test no pairs": ({"test": lambda: [X]}, TypeError, "batches must give pairs of tensors .*, got Tensor"),
    "test shape": (
        {"test": lambda: [(X[..., :4], Y)]},
        ValueError,
        r"test must give images of shape \(3, 8, 8\), got \(3, 8, 4\)",
    ),
    "measure alone": ({"measure": halves}, ValueError, "measure must come with test, got measure alone"),
    "measure by name": ({"measure": "AP"}, TypeError, "measure must be a function of a network and batches, got str"),
    "resume": ({"resume": True}, ValueError, "resume must come with an out folder, got out=None"),
    "nothing to resume": (
        {"resume": True, "out": "runs/nowhere"},
        ValueError,
        "resume must find a run to go on with, got none: there is no runs/nowhere/config.json",
    ),
    "resume by name": ({"resume": "no"}, TypeError, "resume must be True or False, got 'no'"),
    "out": ({"out": 3}, TypeError, "out must be a path, got 3"),
    "device": ({"device": 1.5}, TypeError, "device must be a device, got 1.5"),
    "progress": ({"progress": True}, TypeError, "progress must be a Progress, got True"),
    "profile in a list": ({"profile": []}, TypeError, r"profile must be a name, got \[\]"),
    "sites in a list": ({"sites": ["a"]}, TypeError, "sites must be a mapping of sites to bits, got list"),
    "num_classes by name": ({"num_classes": "5"}, TypeError, "num_classes must be an integer, got '5'"),
    "method in a list": ({"method": ["synq"]}, ValueError, r"method must be one of synq, hast, .*, got \['synq'\]"),
}


@pytest.mark.parametrize("case", REFUSED, ids=list(REFUSED))
def test_bad_arguments_are_one_line(model, case):
    more, kind, message = REFUSED[case]
    with pytest.raises(kind, match=f"^quantize: {message}") as caught:
        quantize(model, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda nets: nets.vgg(norm=False), ValueError, "the model must have batch norms with running statistics"),
        (
            lambda nets: poisoned(nets.residual()),
            ValueError,
            "model must have finite weights, .* 'norms.1.run",
        ),
        (
            lambda nets: nets.residual().double(),
            TypeError,
            "model must have float32 weights, got torch.float64",
        ),
        (lambda nets: nets.residual, TypeError, "model must be a torch.nn.Module, got function"),
        (lambda nets: nn.ReLU(), ValueError, "model must have parameters to quantize, got none"),
        (lambda nets: nets.residual().norms, ValueError, "the model rejects an input .* in the model: "),
    ],
    ids=["no batch norm", "nan", "double", "no module", "no parameters", "no forward"],
)
def test_models_that_are_refused(nets, tmp_path, make, kind, message):
    with pytest.raises(kind, match=f"^quantize: {message}") as caught:
        quantize(make(nets), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # a refused run leaves no folder that a corrected one would trip over


def test_a_forced_backend_that_is_missing_is_refused_at_the_door(model, tmp_path, monkeypatch):
    monkeypatch.setattr(backend.module("cuda"), "missing", lambda: "no CUDA device is visible")
    backend.missing.cache_clear()
    try:
        with backend.backend("cuda"), pytest.raises(NotImplementedError) as caught:
            quantize(model, out=tmp_path / "run")
    finally:
        backend.missing.cache_clear()
    said = "quantize: backend must be one that runs here, got 'cuda': no CUDA device is visible"
    assert str(caught.value) == said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fresh", [True, False])
def test_a_model_that_looks_untrained_is_said_in_one_line(nets, model, capsys, fresh):
    quantize(nets.Residual().eval() if fresh else model, progress=Progress())
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    said = "warning: the model's batch norms have seen no image: were its trained weights loaded?"
    assert lines == [said] * fresh


def test_the_other_calls_refuse_what_is_no_model(tmp_path):
    with pytest.raises(TypeError, match=r"^evaluate: model must be a torch.nn.Module, got int$"):
        zsq.evaluate(3, [])
    with pytest.raises(TypeError, match=r"^evaluate: batches must give pairs of tensors .*, got int$"):
        zsq.evaluate(nn.Linear(1, 1), 3)
    with pytest.raises(TypeError, match=r"^load: model must be a torch.nn.Module, got NoneType$"):
        zsq.load(tmp_path / "x.safetensors", None)


def test_shapes_the_model_rejects_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^quantize: the model rejects an input .*3, 9, 9\) in module 'fc'"):
        quantize(Picky().eval(), shape=(3, 9, 9), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_would_fail_late_is_refused_before_any_work(nets, tmp_path):
    odd = nets.residual((3, 10, 10))
    with pytest.raises(ValueError, match=r"^quantize: input_shape must have height and width divisible by 4 where"):
        quantize(odd, shape=(3, 10, 10), config=changed(QUICK, ranges="generator"), out=tmp_path / "run")
    flat = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with pytest.raises(ValueError, match=r"^quantize: the model must have a convolution with a map larger than 1 x 1"):
        quantize(flat, shape=(3, 2, 2), ideas=FeatureAlign(0), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"^synthesize: the model must have batch norms"):
        zsq.synthesize(nets.vgg(norm=False), "synq", input_shape=(3, 8, 8), config=QUICK)


def test_an_out_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"^quantize: out must be a folder that can be written, got"):
            quantize(model, out=out)


def test_saving_and_loading_refuse_what_does_not_fit(model, result, nets, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"^save: path must be in a folder that can be written, got .*nowhere"):
        result.save(tmp_path / "nowhere" / "m.safetensors")
    result.save(path)
    with pytest.raises(ValueError, match=r"^load: model must be the saved architecture; '.*' is .* there, .* here"):
        zsq.load(path, nets.residual(classes=4))
    with pytest.raises(ValueError, match=r"^load: model must be the saved architecture|^load: the model rejects"):
        zsq.load(path, nets.vgg())
    whole = path.read_bytes()
    for old, new, message in (
        (b"zsq_ext.quantized", b"zsq_ext.quantizer", "must be a quantized model of zsq_ext, got format"),
        (b'format_version\\": 1', b'format_version\\": 2', "must have format version 1, got 2"),
        (b'\\"w_bits\\": 4', b'\\"w_bits\\": 0', "must have a complete header, but: QConfig: w_bits must be"),
        (b'\\"qconfig\\"', b'\\"qconfih\\"', "must have a complete header, but: 'qconfig'"),
        (b'\\"num_classes\\"', b'\\"num_klasses\\"', "must have a complete header, but: .*num_klasses"),
    ):
        changed = whole.replace(old, new)
        assert changed != whole
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"^load: .*m.safetensors {message}"):
            zsq.load(path, model)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^load: .*m.safetensors must be a complete safetensors file"):
        zsq.load(path, model)


def test_evaluate_runs_in_eval_mode_and_gives_the_modes_back(model):
    net = copy.deepcopy(model).train()
    net.norms[0].eval()
    modes, before = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    top1 = zsq.evaluate(net, [(X, Y)])
    assert top1 == zsq.evaluate(copy.deepcopy(net).eval(), [(X, Y)])
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_an_idea_in_place_of_the_methods_own_is_named(model, capsys):
    quantize(model, ideas=(LowPass(d0=3.0),), progress=None)
    assert "LowPass(d0=3.0, when='step') replaces the method's own LowPass(d0=" in capsys.readouterr().err


def test_evaluate_refuses_what_is_not_a_batch(result):
    images, labels = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    for batches, kind, message in (
        ([images], TypeError, r"batches must give pairs of tensors \(images, labels\), got Tensor"),
        ([(images, labels, labels)], TypeError, "pairs of tensors .*, got .'Tensor', 'Tensor', 'Tensor'"),
        ([{"image": images}], TypeError, "pairs of tensors .*, got dict"),
        ([(images, [0] * 4)], TypeError, "pairs of tensors .*, got .'Tensor', 'list'"),
        ([(images, labels[:3])], ValueError, r"\(N, C, H, W\) and \(N,\), got \(4, 3, 8, 8\) and \(3,\)"),
        ([], ValueError, "must hold at least one image"),
    ):
        with pytest.raises(kind, match=f"^evaluate: .*{message}"):
            zsq.evaluate(result.model, batches)
    assert zsq.evaluate(nn.Flatten(), [(torch.eye(4).view(4, 4, 1, 1), torch.arange(4))]) == 100.0


def test_a_result_in_one_line(result):
    assert repr(result).startswith(
        f"Result(synq W4A4, fine-tuning, 8 images, agreement {result.quality.agreement:.1f} % on 4 images, "
    )
    assert "\n" not in repr(result)


def test_input_specs(model):
    spec = zsq.InputSpec((3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), valid_range=(0, 1))
    result = quantize(model, shape=None, input_spec=spec)
    assert result.spec == replace(spec, num_classes=5)
    pixels = torch.rand(2, 3, 8, 8)
    # a division and a multiplication, an addition and a subtraction of numbers below 10, each 2^-24 relative
    torch.testing.assert_close(spec.denormalise(spec.normalise(pixels)), pixels, rtol=0, atol=4 * 10 * 2**-24)
    assert spec.normalise(torch.full((1, 3, 1, 1), 0.5)).flatten().tolist() == pytest.approx([0, 0.5, 2])
    assert zsq.InputSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for more, message in (
        ({"mean": (1, 2)}, r"mean must have one value per channel \(3\)"),
        ({"std": (1, 1, 0)}, "std must be > 0 in every channel"),
        ({"valid_range": (1, 1)}, r"valid_range must be \(low, high\) with low < high"),
        ({"num_classes": 1}, "num_classes must be an integer >= 2, got 1"),
    ):
        with pytest.raises(ValueError, match=f"^InputSpec: {message}"):
            zsq.InputSpec((3, 8, 8), **more)


class Heads(nn.Module):
    """Two maps of heads, as a detector has them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.body(x)
        return {"classes": self.classes(x), "boxes": [self.boxes(x)]}


def test_a_network_with_heads_and_no_classes():
    model = Heads().eval()
    own = methods.get("dgh").config("smoke", "repo")
    stored = replace(own.images.stored, batch=4, iterations=2, border=2)
    recipe = replace(own, images=replace(own.images, images=4, held_out=2, stored=stored))
    given = {"input_shape": (3, 8, 8), "config": recipe, "tune": "none", "w_bits": 8, "a_bits": 8, "progress": QUIET}
    result = zsq.quantize(model, "dgh", **given)
    assert result.labels is None
    assert result.quality.outputs_db.keys() == {"classes", "boxes.0"}
    assert "outputs at least" in repr(result)
    assert result.figures.layers
    assert result.figures.logit_ranges == ()

    def spread(network, batches):
        return {"spread": max(network(images)["classes"].std().item() for images, _ in batches)}

    measured = zsq.quantize(model, "dgh", **given, test=lambda: [(result.images, None)], measure=spread)
    assert measured.evaluations == [{"epoch": 0, **spread(measured.model, [(result.images, None)])}]
    assert measured.best_accuracy == {}
    heads, expected = result.model(result.images), model(result.images)
    assert torch.allclose(heads["boxes"][0], expected["boxes"][0], atol=0.1)
    for more, message in (
        ({"num_classes": 6}, "num_classes must be left out for a model that is no classifier, got 6"),
        ({"test": list}, "test must come with a measure for a network that is no classifier, .*precision_of$"),
        ({"tune": "qat"}, r"model must be a classifier, with one output \(N, K\), for fine-tuning"),
    ):
        with pytest.raises(ValueError, match=f"^quantize: {message}"):
            zsq.quantize(model, "dgh", **{**given, **more})
    with pytest.raises(ValueError, match=r"^quantize: model must be a classifier, .* for images with labels"):
        zsq.quantize(model, "synq", w_bits=8, a_bits=8, input_shape=(3, 8, 8), progress=QUIET)
    with pytest.raises(ValueError, match=r"^evaluate: model must be a classifier that returns logits .*, got dict"):
        zsq.evaluate(model, [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))])
