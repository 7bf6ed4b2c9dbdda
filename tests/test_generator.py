"""The generators: the published layers, and the short way through upsampling and convolution.

Broken on purpose, each turned a test here red:

* the sums of taps not turned by half a circle, or rows turned and columns not; means for sums; a column of taps left
  out; the bias left out; bilinear upsampling in the plain way                           -> the two ways agree, by hand
* eps 1e-5 in an inner norm, 0.8 in the first; slope 0.01; tanh behind the last norm; scales that start at 0; the
  embedding added to the noise, or in the conditional kind too                           -> the layers by hand
* unbiased variance; one value too many counted; the shift without the mean; the label ignored by scales, or by shifts
                                                                                         -> the layers, norms by hand
* running statistics in eval mode                                                        -> standardised
* the kind by the smaller side, or conditional from 64 pixels on; a height of 0 accepted -> sizes, what it refuses
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zsq_ext.synth.generator import Generator, LabelNorm, UpConv, kind_for

LABELS = torch.tensor([0, 3, 3, 9])


def twins(build, dtype=torch.float32):
    """The same module, in the short and in the plain way."""
    short, plain = build(plain=False).to(dtype), build(plain=True).to(dtype)
    plain.load_state_dict(short.state_dict())
    return short, plain


def by_hand(generator, z, labels):
    """The published layers one by one, as far as possible from how they are written in the package."""
    weights = generator.state_dict()

    def norm(x, name, eps):
        x = nn.BatchNorm2d(x.shape[1], eps=eps, affine=False).to(x.dtype).train()(x)
        rows = labels if generator.kind == "conditional" else torch.zeros_like(labels)
        weight, bias = (weights[f"{name}.{part}"][rows][:, :, None, None] for part in ("weight", "bias"))
        return weight * x + bias

    def conv(x, name):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    h = z * weights["embedding.weight"][labels] if generator.kind == "embedding" else z
    h = F.linear(h, weights["project.weight"], weights["project.bias"]).reshape(len(z), *generator.small)
    h = norm(h, "norm0", 1e-5)
    for n in (1, 2):
        h = conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3), f"up{n}")
        h = F.leaky_relu(norm(h, f"norm{n}", 0.8), 0.2)
    x = torch.tanh(conv(h, "out"))
    return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("kind", ["embedding", "conditional"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 20)])
def test_the_layers_are_the_published_ones(kind, shape):
    torch.manual_seed(0)
    generator = Generator(10, shape, latent=7, kind=kind).double()
    scales = [p for name, p in generator.named_parameters() if name.startswith("norm")]
    for n, p in enumerate(scales):
        assert torch.equal(p, torch.full_like(p, 1 - n % 2)), "scales start at 1 and shifts at 0"
    with torch.no_grad():
        for p in scales:
            p.add_(torch.rand_like(p))
    z = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(generator(z, LABELS), by_hand(generator, z, LABELS), rtol=1e-11, atol=1e-11)


def test_the_sizes_are_the_published_ones():
    small = Generator(10, (3, 32, 32))
    with torch.device("meta"):
        large = Generator(1000, (3, 224, 224))
    for generator, side, rows in ((small, 8, 1), (large, 56, 1000)):
        shapes = {name: tuple(p.shape) for name, p in generator.named_parameters()}
        norms = {f"norm{n}.{part}": (rows, c) for n, c in enumerate((128, 128, 64)) for part in ("weight", "bias")}
        assert norms.items() <= shapes.items()
        rest = {name: shape for name, shape in shapes.items() if name not in norms}
        assert rest == {
            **({"embedding.weight": (10, 100)} if generator is small else {}),
            "project.weight": (128 * side**2, 100),
            "project.bias": (128 * side**2,),
            "up1.weight": (128, 128, 3, 3),
            "up1.bias": (128,),
            "up2.weight": (64, 128, 3, 3),
            "up2.bias": (64,),
            "out.weight": (3, 64, 3, 3),
            "out.bias": (3,),
        }
        millions = sum(p.numel() for name, p in generator.named_parameters() if name in rest) / 1e6
        assert f"{millions:.3g}" == {8: "1.05", 56: "40.8"}[side]
    assert [kind_for((3, *size)) for size in ((32, 32), (64, 64), (64, 68), (224, 224))] == [
        "embedding",
        "embedding",
        "conditional",
        "conditional",
    ]


def test_the_start_is_torchs_own():
    """Layers begin as ``nn.Linear`` and ``nn.Conv2d`` do, drawn in the order of the published module."""
    torch.manual_seed(3)
    generator = Generator(10, (3, 8, 8), latent=5)
    torch.manual_seed(3)
    theirs = [
        nn.Embedding(10, 5),
        nn.Linear(5, 128 * 4),
        nn.Conv2d(128, 128, 3),
        nn.Conv2d(128, 64, 3),
        nn.Conv2d(64, 3, 3),
    ]
    ours = [generator.embedding, generator.project, generator.up1, generator.up2, generator.out]
    for mine, other in zip(ours, theirs, strict=True):
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)


# The short way


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 3), (8, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_two_ways_agree_with_all_gradients(size, dtype, tolerance, batch):
    """The plain way in fp64 is the truth (its own fp32 is further off): 1e-6 of the largest value is 17 units in the
    last place of fp32, for sums of 9 * 128 products or more."""
    torch.manual_seed(0)
    short = UpConv(128, 6).to(dtype)
    plain = UpConv(128, 6, plain=True).double()
    assert list(short.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    plain.load_state_dict(short.state_dict())
    x, grad = torch.randn(batch, 128, *size, dtype=dtype), torch.randn(batch, 6, 2 * size[0], 2 * size[1], dtype=dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = []
        for layer in (short, plain):
            seen = x.to(layer.weight.dtype).clone(memory_format=memory_format).requires_grad_()
            y = layer(seen)
            found.append([y, *torch.autograd.grad(y, [seen, *layer.parameters()], grad.to(y.dtype))])
        for got, expected in zip(*found, strict=True):
            assert got.shape == expected.shape
            assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_every_tap_reaches_the_border_it_should():
    """One tap and one pixel at a time: exact, so that a tap in a wrong place is no rounding."""
    short, plain = twins(lambda plain: UpConv(1, 1, plain=plain))
    for tap, pixel in itertools.product(range(9), range(6)):
        for layer in (short, plain):
            layer.bias.data.fill_(0.5)
            layer.weight.data.copy_(torch.eye(9)[tap].view(1, 1, 3, 3))
        x = torch.eye(6)[pixel].view(1, 1, 2, 3)
        assert torch.equal(short(x), plain(x)), (tap, pixel)


def macs(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e6


@pytest.mark.parametrize(
    ("kind", "size", "expected"), [("embedding", 32, (115.8, 52.9)), ("conditional", 224, (5676, 2594))]
)
def test_it_takes_fewer_products(kind, size, expected):
    """In millions per image: 9 taps become 4, the first and the last layer stay."""
    with torch.device("meta"):
        z, labels = torch.randn(2, 100), torch.zeros(2, dtype=torch.int64)
        plain, short = (Generator(10, (3, size, size), kind=kind, plain=p) for p in (True, False))
        for generator, counted in zip((plain, short), expected, strict=True):
            for norm in (generator.norm0, generator.norm1, generator.norm2):
                norm.forward = lambda u, labels: u  # no products, and its op wants real memory
            assert macs(lambda g=generator: g(z, labels)) / 2 == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("kind", ["embedding", "conditional"])
def test_a_generator_is_the_same_in_either_way(kind):
    torch.manual_seed(0)
    short, plain = twins(lambda plain: Generator(10, (3, 16, 12), kind=kind, plain=plain), torch.float64)
    z, grad = torch.randn(4, 100, dtype=torch.float64), torch.randn(4, 3, 16, 12, dtype=torch.float64)
    images = [generator(z, LABELS) for generator in (short, plain)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-11)
    gradients = [
        torch.autograd.grad(x, list(g.parameters()), grad) for x, g in zip(images, (short, plain), strict=True)
    ]
    for got, expected in zip(*gradients, strict=True):
        # a bias in front of a norm has no gradient but rounding
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# Norms


def test_norms_by_hand_with_all_gradients():
    torch.manual_seed(0)
    labels = torch.tensor([2, 0, 2, 1])
    for classes in (1, 5):
        norm = LabelNorm(6, classes, eps=0.8).double()
        with torch.no_grad():
            norm.weight.add_(torch.rand_like(norm.weight))
            norm.bias.add_(torch.randn_like(norm.bias))
        u = (3 + torch.randn(4, 6, 3, 5, dtype=torch.float64)).requires_grad_()
        rows = labels if classes > 1 else torch.zeros_like(labels)
        mean, var = u.mean((0, 2, 3), keepdim=True), u.var((0, 2, 3), correction=0, keepdim=True)
        weight, bias = (p[rows][:, :, None, None] for p in (norm.weight, norm.bias))
        expected = weight * (u - mean) / (var + 0.8).sqrt() + bias
        got = norm(u, labels)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        grad, inputs = torch.randn_like(u), [u, norm.weight, norm.bias]
        for a, b in zip(
            torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["embedding", "conditional"])
def test_images_are_standardised_whatever_the_mode_and_depend_on_noise_and_label(kind):
    torch.manual_seed(0)
    generator = Generator(10, (3, 32, 32), kind=kind)
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(0.1 * torch.randn_like(p))
    z, labels = torch.randn(8, 100), torch.arange(8)
    images = generator(z, labels)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(generator.eval()(z, labels), images)
    mean, variance = images.double().mean((0, 2, 3)), images.double().var((0, 2, 3), correction=0)
    # batch norm in fp32: the mean of 8192 values, taken off numbers of standard deviation sqrt(v), at 2^-24 each
    torch.testing.assert_close(mean, torch.zeros(3).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(variance, torch.ones(3).double(), rtol=0, atol=1e-2)
    assert not torch.equal(images, generator(z, labels.flip(0)))
    assert not torch.equal(images, generator(z + 1, labels))


def test_a_batch_of_one():
    torch.manual_seed(0)
    for kind in ("embedding", "conditional"):
        image = Generator(10, (3, 8, 8), kind=kind)(torch.randn(1, 100), torch.tensor([4]))
        assert image.mean((0, 2, 3)).abs().max() < 1e-5
        assert image.std() > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, (3, 30, 32)), r"input_shape must have height and width divisible by 4 .*, got \(3, 30, 32\)"),
        ((10, (3, 32, 30)), r"input_shape must have height and width divisible by 4 .*, got \(3, 32, 30\)"),
        ((10, (1, 2, 2)), "input_shape must have height and width divisible by 4"),
        ((10, (3, 0, 4)), "input_shape must have height and width divisible by 4"),
        ((1, (3, 8, 8)), "num_classes must be at least 2, got 1"),
        ((10, (3, 8, 8), 0), "latent must be at least 1, got 0"),
        ((10, (3, 8, 8), 100, "big"), "kind must be None or one of embedding, conditional, got 'big'"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"^Generator: {message}"):
        Generator(*arguments)
