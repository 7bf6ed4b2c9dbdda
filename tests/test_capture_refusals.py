"""What capture refuses: one sentence that names the module, and for control flow the line."""

import pytest
import torch
import torch.nn.functional as F
from capture_nets import Net, alive, faithful, net, pointwise, portrait, untouched
from torch import nn

from zsq_ext.quant.capture import capture


def refused(model, kind, match, shape=(3, 8, 8)):
    example = torch.zeros(2, *shape)
    with untouched(model, example), pytest.raises(kind, match=match) as caught:
        capture(model, example)
    assert "\n" not in str(caught.value)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_control_flow_on_values_names_the_module_and_the_line(capsys):
    model = net(lambda self, x: self.gate(F.relu(x)), gate=Branching())
    refused(
        model,
        NotImplementedError,
        r"module 'gate' \(Branching\) cannot be captured .*, at .*refusals.py:\d+ \(.*if .*\); .* depend on values",
    )
    assert "def forward" not in capsys.readouterr().err  # torch's own report of it, a whole graph


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_a_hook_computes_is_refused():
    model = net(lambda self, x: F.relu(x))
    nn.utils.weight_norm(model.conv)  # sets a plain tensor before every forward
    with torch.no_grad():
        model(torch.zeros(2, 3, 8, 8))
    with pytest.raises(
        NotImplementedError, match=r"module 'conv' computes the weight of its conv2d .*remove_weight_no"
    ):
        capture(model.eval(), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("product", [lambda x, w: x @ w, lambda x, w: torch.einsum("nk,kj->nj", x, w)])
def test_a_layer_written_as_a_product_is_refused(product):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return product(x.mean((2, 3)), self.weight)[:, :, None, None]

    refused(
        net(lambda self, x: self.head(x), head=Head()), NotImplementedError, r"'head' multiplies by a parameter with"
    )


def large_batches_apart(self, x):
    return F.relu(x) * 2 if x.size(0) > 8 else F.relu(x)


@pytest.mark.parametrize(
    ("body", "rule"),
    [(lambda self, x: F.relu(x).view(2, 4, 8, 8), r"constant \(2\)"), (large_batches_apart, r"size\(\)\[0\] <= 8")],
)
def test_a_model_that_minds_the_batch_size(body, rule):
    refused(net(body), NotImplementedError, rf"must work alike at every batch size.*use x.size\(0\) or -1.*{rule}")


def aside(self, x):
    view = x.view(x.size(0), -1)
    x.relu_()
    return x + view.sum()


def beneath(self, x):
    x.view(x.size(0), -1).mul_(2)
    x[:, 0] = 0
    return F.relu(x)


def split(self, x):
    left, right = x.chunk(2, 1)
    left.relu_()
    return torch.cat([left, right], 1) + x


def after_dropout(self, x):
    dropped = F.dropout(x, 0.5, self.training).flatten(1)
    x.relu_()
    return dropped.view_as(x)


@pytest.mark.parametrize("body", [aside, beneath, split, after_dropout])
def test_a_change_behind_a_view(body):
    refused(net(body), NotImplementedError, r"the model changes a tensor in place by \w+_ and reads it later")


def test_a_change_that_no_view_outlives_is_fine():
    faithful(net(lambda self, x: x.flatten(1).relu_().view(-1, 4, 8, 8)))


def test_batch_norms_without_statistics():
    model = net(lambda self, x: F.relu(self.free(x)), free=nn.BatchNorm2d(4, track_running_stats=False))
    refused(model, NotImplementedError, r"batch norm 'free' normalises by batch statistics \(track_running_stats=False")


def test_a_batch_norm_that_never_runs():
    refused(alive(Net(spare=nn.BatchNorm2d(4))), NotImplementedError, "batch norm 'spare' is never run")


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (lambda x: x.argmax(1), "logits, or dicts, lists and tuples of floating-point tensors, got torch.int64"),
        (lambda x: {"logits": x, "aux": [x, None]}, "floating-point tensors, got NoneType at 'aux.1'"),
        (lambda x: {"logits": (x, {3})}, "floating-point tensors, got set at 'logits.1'"),
        (lambda x: x.mean([1, 2, 3]), r"first dimension is the batch \(2\), .* got \(2,\)"),
        (lambda x: [x, x.mean([2, 3]).t()], r"first dimension is the batch \(2\), .* got \(4, 2\) at '1'"),
        (lambda x: {"heads": []}, "at least one tensor, got none"),
    ],
)
def test_an_output_that_holds_something_else(head, match):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    model.forward = lambda x, run=model.forward: head(run(x))
    with pytest.raises(ValueError, match=f"capture: the model must return .*{match}"):
        capture(model, torch.zeros(2, 3, 8, 8))


def test_outputs_of_one_path():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.forward = lambda x, run=model.forward: {"a.0": run(x), "a": [run(x)]}
    with pytest.raises(ValueError, match=r"a path of its own, got 'a\.0' twice"):
        capture(model, torch.zeros(2, 3, 8, 8))


def test_an_input_that_the_model_rejects_names_the_module():
    refused(
        alive(Net()), ValueError, r"rejects an input of shape \(2, 1, 8, 8\) in module 'conv' \(Conv2d\)", (1, 8, 8)
    )


def test_models_that_are_not():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        capture(portrait, torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="model must have parameters to quantize, got none"):
        capture(nn.Flatten(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(TypeError, match=r"example must be a floating-point tensor, got torch.uint8"):
        capture(Net(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"a batch of two or more, got shape \(1, 3, 8, 8\)"):
        capture(Net(), torch.zeros(1, 3, 8, 8))


def test_a_model_that_cannot_be_copied():
    model = Net()
    model.cache = model.conv.weight * 2  # not a leaf: deepcopy refuses it
    refused(model, ValueError, "the model cannot be copied: Only Tensors created explicitly")


def test_a_weight_that_is_computed():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.conv)
    refused(model, NotImplementedError, r"'conv[^']*' computes the weight of its conv2d while it runs")
    nn.utils.parametrize.remove_parametrizations(model.conv, "weight")
    faithful(alive(model))


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (lambda self, x: F.dropout(F.relu(x), 0.5), "the model applies dropout in eval mode"),
        (lambda self, x: x + torch.randn_like(x), "draws random numbers in eval mode"),
    ],
)
def test_a_random_model(body, match):
    with torch.random.fork_rng(), pytest.raises(NotImplementedError, match=match):
        capture(net(body), torch.zeros(2, 3, 8, 8))


def test_an_autocast_region():
    def body(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.inner(x)
        return x.float()

    refused(net(body, inner=pointwise(4, 4)), NotImplementedError, "under wrap_with_autocast")
