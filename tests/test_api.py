"""The front door on networks it has never seen: what its calls give."""

import copy
import json
import random
from dataclasses import replace

import api_runs
import numpy
import pytest
import torch
from api_runs import NO_TUNING, QUICK, X, Y, halves, quantize, same_state
from recipes import changed
from torch import nn

import zsq_ext as zsq
from zsq_ext import api, methods
from zsq_ext.core.progress import QUIET, Progress
from zsq_ext.methods import synq
from zsq_ext.methods.job import Images
from zsq_ext.quant.modules import activation_quantizers
from zsq_ext.tune.ideas import CamAlign, FeatureAlign, LowPass, SoftLabels

model = api_runs.model
result = api_runs.result


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
    unlabelled = Images(images[:20], None, images[20:], None)
    predicted = quantize(model, images=unlabelled, tune="none")
    assert torch.equal(predicted.labels, model(images[:20]).argmax(1))
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


@pytest.mark.parametrize("fresh", [True, False])
def test_a_model_that_looks_untrained_is_said_in_one_line(nets, model, capsys, fresh):
    quantize(nets.Residual().eval() if fresh else model, progress=Progress())
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    said = "warning: the model's batch norms have seen no image: were its trained weights loaded?"
    assert lines == [said] * fresh


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
