"""Reconstruction: what it minimises, what it leaves behind, and that nothing of a run is lost."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zsq_ext as zsq
from zsq_ext.api.result import Result
from zsq_ext.core.progress import QUIET, Progress
from zsq_ext.core.rng import stream
from zsq_ext.core.run import Run
from zsq_ext.core.spec import InputSpec
from zsq_ext.core.steps import Diverged, Stage
from zsq_ext.quant.capture import capture
from zsq_ext.quant.config import QConfig
from zsq_ext.quant.modules import WeightQuantizer, activation_quantizers, calibrating
from zsq_ext.quant.prepare import prepare
from zsq_ext.tune import learn
from zsq_ext.tune import reconstruct as reconstruct_module
from zsq_ext.tune.learn import betas
from zsq_ext.tune.reconstruct import reconstruct
from zsq_ext.tune.reconstruct_config import ADAROUND, BRECQ, GENIE_M, ReconstructConfig, reconstruct_config
from zsq_ext.tune.soft import SoftWeights

IMAGES = torch.randn(22, 3, 8, 8, generator=torch.Generator().manual_seed(1)).contiguous(
    memory_format=torch.channels_last
)
QUICK = {"iterations": 30, "batch": 8, "lr_rounding": 2e-2, "lr_activation_step": 2e-3, "range_images": 16, "chunk": 7}
GENIE = ReconstructConfig(**{**vars(GENIE_M), **QUICK, "lr_weight_step": 1e-3, "rounding": 0.01})
BRECQS = ReconstructConfig(**{**vars(BRECQ), **QUICK, "activation_iterations": 20})
LAYERWISE = ReconstructConfig(**{**vars(ADAROUND), **QUICK, "activation_iterations": 20})
KINDS = pytest.mark.parametrize("config", [GENIE, BRECQS, LAYERWISE], ids=["genie_m", "brecq", "adaround"])


def changed(config, **fields):
    return ReconstructConfig(**{**vars(config), **fields})


def qconfig(bits=3, placement="all_layers", **more):
    return QConfig(bits, bits, placement, **{"edge_bits": 8, "w_range": "lp", "a_range": "lp", **more})


def tuned(teacher, config, qconf=None, run=None, images=IMAGES, progress=QUIET, seed=0):
    student = prepare(teacher, qconf or qconfig())
    stage = Stage(run or Run(None, {}), "reconstruct", seed, progress)
    return student, reconstruct(stage, teacher, student, images, config)


def quantizers(student, kind=WeightQuantizer):
    return {name: module for name, module in student.named_modules() if isinstance(module, kind)}


def weights(student):
    """(parameter, its quantizer) of every quantized weight."""
    return [
        (student.get_parameter(str(node.args[0].target)), student.get_submodule(str(node.target)))
        for node in student.graph.nodes
        if node.op == "call_module" and isinstance(student.get_submodule(str(node.target)), WeightQuantizer)
    ]


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# The schedule


def test_the_exponent_falls_linearly_behind_the_warm_up():
    begin, exponents = betas(ReconstructConfig(warmup=0.2, beta=(20, 2)), 100, torch.zeros(1))
    assert begin == 20
    assert exponents[20] == 20
    assert exponents[99] == 2
    torch.testing.assert_close(exponents[20:].diff(), torch.full((79,), -18 / 79), rtol=0, atol=1e-5)  # 2 ulp of 20
    assert betas(ReconstructConfig(warmup=1.0), 10, torch.zeros(1))[0] == 10
    assert betas(ReconstructConfig(), 1, torch.zeros(1))[1].shape == (1,)


# What is minimised


class Two(nn.Module):
    """Two units: the second reads what the first one yields."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).mean([2, 3]))


@pytest.fixture(scope="module")
def two(nets):
    return capture(nets.seen(Two, 3, 8, 8), torch.zeros(2, 3, 8, 8)).to(memory_format=torch.channels_last)


def test_rounding_is_learned_as_adaround_writes_it(two):
    """The first unit in plain PyTorch: its losses and its weights, from the same batches."""
    count, batch, weight = 30, 8, 0.02
    config = changed(BRECQS, rounding=weight, warmup=0.5, activation_iterations=0, batch=batch, lr_rounding=0.1)
    qconf = qconfig(3, "after_relu", edge_bits=None)
    student, found = tuned(two, config, qconf)

    conv, bn = two.get_submodule("conv"), two.get_submodule("bn")
    fresh = prepare(two, qconf)
    scale, zero_point, qmin, qmax = fresh.get_submodule("quantizers.conv_weight").params(conv.weight)
    s, z = (t.view(-1, 1, 1, 1) for t in (scale, zero_point))
    floor = (conv.weight.detach() / s).floor()
    rest = conv.weight.detach() / s - floor
    v = (-torch.log(1.2 / (rest + 0.1) - 1)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=config.lr_rounding)

    def unit(w, x):
        u = F.conv2d(x, w, padding=1)
        return F.relu(F.batch_norm(u, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, 1e-5))

    rows = []
    for n in range(count):
        chosen = torch.randperm(len(IMAGES), generator=stream(0, "reconstruct-0-rounding/batch", n))[:batch]
        x, h = IMAGES[chosen], (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
        error = (unit((floor + z + h).clamp(qmin, qmax).sub(z) * s, x) - unit(conv.weight, x)).square()
        mse = error.sum(1).mean().detach()
        loss = error.sum(1).mean()
        row = {"mse": mse.item()}
        if n >= 15:
            beta = 20 - 18 * (n - 15) / 14
            regulariser = weight * (1 - (2 * h - 1).abs().pow(beta)).sum()
            loss, row["rounding"] = loss + regulariser, regulariser.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (n + 1) % 10 == 0:
            rows.append(row)
    mine = [row for row in found.history if row["batch"] == 0]
    assert [row["step"] for row in mine] == [10, 20, 30]
    for row, expected in zip(mine, rows, strict=True):
        assert row.keys() - {"batch", "step"} == expected.keys()
        for term in expected:  # sums of some 3,000 terms in another order: 50 ulp, grown over 30 steps
            assert row[term] == pytest.approx(expected[term], rel=1e-4)
    with torch.no_grad():
        rounded = (floor + z + (v >= 0)).clamp(qmin, qmax).sub(z) * s
    assert (v >= 0).ne(rest >= 0.5).sum() > 3  # it does not just round to the nearest
    assert torch.equal(student.get_parameter("conv.weight"), rounded)


@KINDS
@pytest.mark.parametrize("placement", ["all_layers", "academic"])
def test_every_unit_comes_nearer_and_so_does_the_network(teacher, config, placement):
    student, found = tuned(teacher, changed(config, iterations=40), qconfig(2, placement))
    layers = config.granularity == "layer"
    assert [row["step"] for row in found.blocks] == list(range(1, 1 + (5 if layers else 4)))
    assert all(math.isfinite(row["before"]) for row in found.blocks)
    assert sum(row["after"] < row["before"] for row in found.blocks) >= len(found.blocks) - 1
    nearest, _ = tuned(teacher, changed(config, iterations=0, activation_iterations=0), qconfig(2, placement))
    with torch.no_grad():
        expected = teacher(IMAGES)
        before, after = ((net(IMAGES) - expected).square().mean() for net in (nearest, student))
    assert after < 0.9 * before


def test_units_read_the_quantized_prefix(two):
    """The last unit alone: its error is that behind a first unit that is rounded already."""
    student, found = tuned(two, changed(BRECQS, iterations=0, activation_iterations=0), qconfig(2))
    with torch.no_grad():
        error = (student(IMAGES) - two(IMAGES)).square().sum(1).mean().item()
    # the same network operator by operator: a value on a rounding boundary may fall on either side
    assert found.blocks[-1]["after"] == pytest.approx(error, rel=1e-3)


def test_dropping_everything_teaches_no_activation_step(teacher):
    """With probability 1 a unit sees the teacher's inputs and rounds no activation, so no step has a gradient."""
    still, _ = tuned(teacher, changed(GENIE, qdrop=1.0))
    fresh, _ = tuned(teacher, changed(GENIE, qdrop=1.0, iterations=0))
    grids = [[q.params()[0] for q in activation_quantizers(student)] for student in (still, fresh)]
    assert all(torch.equal(a, b) for a, b in zip(*(grid[:2] for grid in grids), strict=True))  # of the first unit
    moved, _ = tuned(teacher, GENIE)
    assert not torch.equal(activation_quantizers(moved)[0].params()[0], grids[1][0])


def test_draws_are_fresh_at_every_step_and_belong_to_the_seed(teacher, monkeypatch):
    config, keys, real = changed(GENIE, iterations=10), [], learn.qdrop
    monkeypatch.setattr(learn, "qdrop", lambda x, x_hat, p, key: (keys.append(key.tolist()), real(x, x_hat, p, key))[1])
    one, again, other = (tuned(teacher, config, seed=seed)[0] for seed in (0, 0, 1))
    assert same(one, again)
    assert not same(one, other)
    assert [offset for _, offset in keys] == 9 * list(range(10))  # three units of three runs read a quantized prefix
    assert len({key for key, _ in keys}) == 6


# What is left behind


@KINDS
@pytest.mark.parametrize("bits", [2, 4])
def test_the_weights_lie_on_grids_that_reproduce_them(teacher, config, bits):
    qconf = qconfig(bits)
    student, _ = tuned(teacher, config, qconf)
    fresh = prepare(teacher, qconf)
    before = quantizers(fresh)
    for (weight, quantizer), name in zip(weights(student), before, strict=True):
        with torch.no_grad():
            assert torch.equal(quantizer(weight), weight)
        scale, zero_point, qmin, qmax = quantizer.params(weight)
        codes = weight / scale.view(-1, *[1] * (weight.ndim - 1))
        assert (codes - codes.round()).abs().max() < 1e-4  # an ulp of at most 2^8 codes
        old, old_zero, *_ = before[name].params(weight)
        assert torch.equal(zero_point, old_zero)
        assert torch.equal(scale, old) == (config.lr_weight_step == 0)
    for quantizer in activation_quantizers(student):
        scale, zero_point, qmin, qmax = quantizer.params()
        assert scale > 0
        assert qmin <= zero_point <= qmax


@KINDS
def test_saved_and_loaded_it_is_the_same_network(nets, config, tmp_path):
    config = changed(config, iterations=10, activation_iterations=10)
    model, qconf = nets.residual(), qconfig(3)
    teacher = capture(model, torch.zeros(2, 3, 8, 8)).to(memory_format=torch.channels_last)
    student, found = tuned(teacher, config, qconf)
    spec = InputSpec((3, 8, 8), num_classes=5)
    labels = torch.zeros(22, dtype=torch.int64)
    result = Result(student, IMAGES, labels, None, spec, qconf, {}, {"tuning": found.history}, [], 0.0)
    result.save(tmp_path / "m.safetensors")
    loaded = zsq.load(tmp_path / "m.safetensors", nets.residual(seed=3))
    assert same(student, loaded)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), student(IMAGES))


def test_only_weights_and_ranges_move(teacher, tools):
    own = {name: value.clone() for name, value in teacher.state_dict().items()}
    before = prepare(teacher, qconfig())
    before.get_parameter("norms.0.weight").requires_grad_(False)
    student = copy.deepcopy(before)
    reconstruct(Stage(Run(None, {}), "reconstruct", 0, QUIET), teacher, student, IMAGES, GENIE)
    for name, value in student.state_dict().items():
        moves = name.startswith("quantizers.") or name in {f"convs.{i}.weight" for i in range(4)} | {"head.weight"}
        assert moves or torch.equal(value, before.state_dict()[name]), name
    assert all(torch.equal(value, own[name]) for name, value in teacher.state_dict().items())
    assert [p.requires_grad for p in student.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in student.parameters())
    assert not any(q.observing for q in activation_quantizers(student))
    assert tools.hooks_on(student) + tools.hooks_on(teacher) == 0


@KINDS
def test_weights_alone_and_few_images(teacher, config):
    student, found = tuned(teacher, config, QConfig(3, None, w_range="lp"), images=IMAGES[:3])
    assert activation_quantizers(student) == []
    assert all(row["step"] <= config.iterations for row in found.history)


def test_the_first_layer_may_stay_as_it_is(two):
    student, found = tuned(two, changed(GENIE, first_layer=False))
    assert {row["batch"] for row in found.history} == {1}
    weight, quantizer = weights(student)[0]
    fresh = prepare(two, qconfig())
    with torch.no_grad():
        assert torch.equal(weight, quantizer(fresh.get_parameter("conv.weight")))


class Shared(nn.Module):
    """One convolution twice, a transposed one, and a layer that two others read."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 3, 3, padding=1), nn.ConvTranspose2d(3, 6, 2)
        self.left, self.right, self.fc = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.up(F.relu(self.conv(F.relu(self.conv(x))))))
        return self.fc(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1).mean([2, 3]))


@KINDS
def test_shared_and_transposed_layers_and_branches(config):
    torch.manual_seed(0)
    teacher = capture(Shared().eval(), torch.zeros(2, 3, 8, 8))
    student, _ = tuned(teacher, changed(config, iterations=10), qconfig(3))
    for weight, quantizer in weights(student):
        with torch.no_grad():
            assert torch.equal(quantizer(weight), weight)
    assert all(q.batches == 1 for q in activation_quantizers(student))  # each was set, by one unit


def test_double_precision(two):
    teacher = copy.deepcopy(two).double()
    student, _ = tuned(teacher, GENIE, images=IMAGES.double())
    for weight, quantizer in weights(student):
        with torch.no_grad():
            assert torch.equal(quantizer(weight), weight)


@KINDS
def test_every_quantizer_is_set_by_one_unit_whatever_it_held(config, monkeypatch):
    torch.manual_seed(0)
    teacher = capture(Shared().eval(), torch.zeros(2, 3, 8, 8))
    config, calls = changed(config, iterations=5, activation_iterations=5), []
    set_before = prepare(teacher, qconfig())
    with calibrating(set_before), torch.no_grad():
        set_before(9 * IMAGES)
    baked = SoftWeights.bake
    monkeypatch.setattr(SoftWeights, "bake", lambda self: (calls.extend(map(id, self._weights)), baked(self))[1])
    reconstruct(Stage(Run(None, {}), "reconstruct", 0, QUIET), teacher, set_before, IMAGES, config)
    assert sorted(calls) == sorted(id(weight) for weight, _ in weights(set_before))
    assert same(set_before, tuned(teacher, config)[0])


def test_nothing_is_kept_that_no_later_unit_reads(teacher, monkeypatch):
    living, stream_ = [], reconstruct_module._stream
    rooms = []

    def counted(network, inputs, room, *rest):
        if room is not None:
            rooms.append(room)
            living.append(len(room._living))
        return stream_(network, inputs, room, *rest)

    monkeypatch.setattr(reconstruct_module, "_stream", counted)
    tuned(teacher, changed(GENIE, iterations=0))
    assert len(set(map(id, rooms))) == 1
    # before the first target; then beside the two values of the prefix, and beside these and the target
    assert living == [0, 1, 2, 3, 2, 3, 2, 3]


# Runs


class Stops(Progress):
    """Raises when a stage of that title has made so many steps."""

    def __init__(self, title, step, error):
        super().__init__(quiet=True)
        self.seen, self.at, self.error = [], (title, step), error

    def stage(self, name, total, done=0):
        outer = self
        self.seen.append((name, done))

        class Meter:
            def __enter__(self):
                self.step = done
                return self

            def __exit__(self, *_):
                pass

            def advance(self, steps=1, note=""):
                self.step += steps
                if name.endswith(outer.at[0]) and self.step == outer.at[1]:
                    raise outer.error

        return Meter()


@pytest.mark.parametrize(
    ("config", "title", "step"),
    [(GENIE, "2/4", 17), (GENIE, "1/4", 30), (BRECQS, "2/4", 25), (BRECQS, "3/4, steps", 13), (LAYERWISE, "4/5", 11)],
)
def test_stopped_within_a_block_and_resumed_it_is_the_unbroken_run(teacher, tools, tmp_path, config, title, step):
    whole, expected = tuned(teacher, config)
    run = Run(tmp_path, {}, checkpoint_seconds=0)
    with pytest.raises(tools.Interrupted):
        tuned(teacher, config, run=run, progress=Stops(title, step, tools.Interrupted))
    again = Stops("never", 0, tools.Interrupted)
    resumed, found = tuned(teacher, config, run=run, progress=again)
    assert same(whole, resumed)
    assert found == expected
    name, done = again.seen[0] if again.seen[0][1] < config.iterations else again.seen[1]
    assert name.endswith(title.partition(",")[0]) or title in name  # no finished unit is run again
    assert done == (step - 1) // 10 * 10  # the last look before
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.json", "seconds.json", *(f"reconstruct-{i}.safetensors" for i in range(len(found.blocks)))}


def test_a_finished_run_repeats_nothing(teacher, tmp_path):
    run = Run(tmp_path, {})
    whole, expected = tuned(teacher, GENIE, run=run)
    progress = Stops("never", 0, None)
    again, found = tuned(teacher, GENIE, run=run, progress=progress)
    assert progress.seen == []
    assert same(whole, again)
    assert found == expected


def test_divergence_says_what_to_try(teacher):
    with pytest.raises(Diverged, match=r"^reconstruct-0-joint: .* is not finite .*lr_rounding"):
        tuned(teacher, changed(GENIE, lr_activation_step=1e38))


@KINDS
def test_activations_in_files_give_the_same_bits_and_leave_no_file(teacher, config, tmp_path):
    config = changed(config, iterations=10, activation_iterations=10)
    kept, found = tuned(teacher, config)
    mapped, other = tuned(teacher, changed(config, cache_bytes=0), run=Run(tmp_path, {}))
    assert same(kept, mapped)
    assert found == other
    assert not list(tmp_path.glob("activations-*"))


def test_what_cannot_be_done_is_refused_before_anything_moves(teacher):
    with pytest.raises(ValueError, match=r"^reconstruct: w_range must be 'lp', .* got 'minmax'"):
        tuned(teacher, GENIE, QConfig(4, 4))
    with pytest.raises(ValueError, match=r"^reconstruct: images must hold at least one image, got none"):
        tuned(teacher, GENIE, images=IMAGES[:0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "net"}, "granularity must be one of block, layer, got 'net'"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"lr_rounding": -1.0}, "lr_rounding must be at least 0, got -1.0"),
        ({"joint": False}, "lr_weight_step must be 0 unless steps are learned jointly, got 0.0001"),
        ({"warmup": 1.1}, r"warmup must be in \[0, 1\], got 1.1"),
        ({"beta": (20.0, 0.5)}, r"beta must be two exponents of at least 1, got \(20.0, 0.5\)"),
        ({"qdrop": 2}, r"qdrop must be in \[0, 1\], got 2"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(ValueError, match=f"^ReconstructConfig: {message}$"):
        ReconstructConfig(**fields)


def test_sizes_of_the_published_settings():
    for kind, published in (("genie_m", GENIE_M), ("brecq", BRECQ), ("adaround", ADAROUND)):
        assert reconstruct_config(kind, "imagenet") == reconstruct_config(kind, "cifar") == published
        smoke = reconstruct_config(kind, "smoke")
        assert smoke.iterations <= 500
        assert (smoke.granularity, smoke.joint, smoke.qdrop) == (
            published.granularity,
            published.joint,
            published.qdrop,
        )
    with pytest.raises(ValueError, match=r"^reconstruct_config: kind must be one of brecq, genie_m, adaround, got 'x'"):
        reconstruct_config("x", "smoke")
    with pytest.raises(ValueError, match=r"^reconstruct_config: size must be one of smoke, cifar, imagenet, got 'x'"):
        reconstruct_config("brecq", "x")
