"""The commands about networks: quantize, synthesize, evaluate."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsq_ext.cli.common import Json, Quiet, check_writable, on_stop, table, to_stdout, write_json

if TYPE_CHECKING:
    from zsq_ext.api import Result

Model = Annotated[
    str,
    typer.Option(
        help="An embedded teacher (resnet20, mobilenet_small) or detector (fpn_small), a network of the zoo such as "
        "resnet18 or 'resnet50(stride_in_1x1=True)', or path.py:function."
    ),
]
Weights = Annotated[Path | None, typer.Option(help="A checkpoint; the embedded networks bring theirs.")]
_DATA_SETS = "Test images: textured_shapes, shape_scenes (for detectors), cifar10:DIR, cifar100:DIR, imagenet:DIR."
DataName = Annotated[str | None, typer.Option("--data", help=_DATA_SETS)]
TestImages = Annotated[int | None, typer.Option(help="Measure on the first so many test images; all by default.")]
InputShape = Annotated[str | None, typer.Option(help="C,H,W of an image, where --data does not say it.")]
Mean = Annotated[str | None, typer.Option(help="The input's mean per channel, such as 0.485,0.456,0.406.")]
Std = Annotated[str | None, typer.Option(help="The input's standard deviation per channel.")]
NumClasses = Annotated[int | None, typer.Option(help="Number of labels, where --data does not say it.")]
Preset = Annotated[str, typer.Option(help="Size of the run: smoke (minutes), cifar, imagenet.")]
Profile = Annotated[str | None, typer.Option(help="Variant: repo, paper (synq), mct (dgh), kmdfq, gdfq, adadfq (agm).")]
Method = Annotated[
    str, typer.Option(help="synq, hast, dgh, gdfq, kmdfq, adadfq, agm, dfq, or a control: minmax, noise.")
]
Seed = Annotated[int, typer.Option(help="Of every random stream of the run.")]
Device = Annotated[str | None, typer.Option(help="Where to work, such as cpu or cuda; the GPU if one is visible.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that --out holds.")]


def quantize(
    ctx: typer.Context,
    model: Model,
    weights: Weights = None,
    method: Method = "synq",
    w_bits: Annotated[str, typer.Option(help="Bits of the weights, 2 to 8.")] = "4",
    a_bits: Annotated[str, typer.Option(help="Bits of the activations, 2 to 8, or none.")] = "4",
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    num_classes: NumClasses = None,
    preset: Preset = "smoke",
    profile: Profile = None,
    tune: Annotated[
        str | None, typer.Option(help="How the images are used: qat, brecq, genie_m, adaround, dfq, none.")
    ] = None,
    idea: Annotated[
        list[str] | None, typer.Option(help="An idea to add, such as 'LowPass(d0=8)'; may be repeated.")
    ] = None,
    placement: Annotated[str | None, typer.Option(help="Rounded activations: after_relu, academic, all_layers")] = None,
    edge_bits: Annotated[int | None, typer.Option(help="Bits of the first and last layer.")] = None,
    a_range: Annotated[str | None, typer.Option(help="Activation ranges: ema, minmax, lp, legacy_ema.")] = None,
    w_range: Annotated[str | None, typer.Option(help="Weight ranges: minmax, lp.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Use these instead of making images: what synthesize wrote, images.safetensors.")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    data: DataName = None,
    test_images: TestImages = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; under runs/ by default.")] = None,
    resume: Resume = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Turns a trained network into a low-bit one without its training data; with --data, measures what was lost."""
    from zsq_ext import api, report
    from zsq_ext.cli import inputs
    from zsq_ext.core.progress import Progress

    check_writable("--json", json)
    progress = Progress(quiet=quiet)
    if test_images is not None and data is None:
        raise ValueError(f"--test-images must come with --data, got {test_images} alone")
    weight_bits = inputs.bits(w_bits, "--w-bits")
    activations = None if a_bits.lower() == "none" else inputs.bits(a_bits, "--a-bits")
    ideas = tuple(inputs.idea(text) for text in idea or ())
    tested = None if data is None else inputs.data_set(data, progress, test_images)
    network = inputs.network(
        model, weights=weights, data=tested, input_shape=input_shape, mean=mean, std=std, num_classes=num_classes
    )
    label = f"W{weight_bits}" + ("" if activations is None else f"A{activations}")
    folder = out or Path("runs") / f"{network.name}-{method}-{label}-{preset}-seed{seed}"
    _resumable(ctx, folder)
    result = api.quantize(
        network.model,
        method,
        w_bits=weight_bits,
        a_bits=activations,
        input_spec=network.spec,
        preset=preset,
        profile=profile,
        tune=tune,
        ideas=ideas,
        placement=placement,
        edge_bits=edge_bits,
        a_range=a_range,
        w_range=w_range,
        images=None if images is None else inputs.images(images),
        test=None if tested is None else tested.batches,
        measure=None if tested is None else tested.measure,
        seed=seed,
        device=inputs.device(device),
        out=folder,
        resume=resume,
        progress=progress,
    )
    # once more, now with the names that only the command knows
    measured_on = "" if tested is None else f"{tested.count} test images of {tested.name}"
    page = report.write(result, folder, measured_on=measured_on, notes={"network": network.name})
    if not to_stdout(json):
        _show(method, result)
        typer.echo(f"{folder / 'model.safetensors'}\n{page}")
    write_json(json, _facts(network.name, result, folder, tested))


def synthesize(
    ctx: typer.Context,
    model: Model,
    weights: Weights = None,
    method: Method = "synq",
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    num_classes: NumClasses = None,
    preset: Preset = "smoke",
    profile: Profile = None,
    seed: Seed = 0,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; under runs/ by default.")] = None,
    png: Annotated[bool, typer.Option("--png", help="Also write every image as a PNG file of its own.")] = False,
    resume: Resume = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Makes a method's synthetic images and stops there: images.safetensors and a grid, images.png."""
    from zsq_ext import api
    from zsq_ext.cli import inputs
    from zsq_ext.core.progress import Progress
    from zsq_ext.report import pictures
    from zsq_ext.report.png import encode

    check_writable("--json", json)
    network = inputs.network(
        model, weights=weights, input_shape=input_shape, mean=mean, std=std, num_classes=num_classes
    )
    folder = out or Path("runs") / f"{network.name}-{method}-images-{preset}-seed{seed}"
    _resumable(ctx, folder)
    made = api.synthesize(
        network.model,
        method,
        input_spec=network.spec,
        preset=preset,
        profile=profile,
        seed=seed,
        device=inputs.device(device),
        out=folder,
        resume=resume,
        progress=Progress(quiet=quiet),
    )
    pixels = pictures.to_pixels(made.images, network.spec)
    chosen = pictures.some(made.images, made.labels, 100)
    (folder / "images.png").write_bytes(encode(pictures.grid(pixels[chosen], columns=10)))
    if png:
        (folder / "png").mkdir(exist_ok=True)
        labels = [""] * len(pixels) if made.labels is None else [f"-class{label}" for label in made.labels.tolist()]
        for n, (label, image) in enumerate(zip(labels, pixels, strict=True)):
            (folder / "png" / f"{n:05d}{label}.png").write_bytes(encode(image))
    counts = {"images": len(made.images), "held_out": len(made.held_out)}
    write_json(json, {"model": network.name, "method": method, "seed": seed, **counts, "out": str(folder)})
    if not to_stdout(json):
        typer.echo(f"{len(made.images)} images to tune on, {len(made.held_out)} more held out")
        typer.echo(f"{folder / 'images.safetensors'}\n{folder / 'images.png'}")


def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help=_DATA_SETS)],
    weights: Weights = None,
    quantized: Annotated[Path | None, typer.Option(help="What quantize wrote, model.safetensors.")] = None,
    test_images: TestImages = None,
    device: Device = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measures top-1, or a detector's AP: of the float network, and of a quantized one made from it."""
    import torch

    from zsq_ext import api
    from zsq_ext.cli import inputs
    from zsq_ext.core.progress import Progress
    from zsq_ext.report.result import title

    check_writable("--json", json)
    progress, place = Progress(quiet=quiet), inputs.device(device)
    tested = inputs.data_set(data, progress, test_images)
    # a quantized file holds all values, so the architecture is enough for it
    network = inputs.network(model, weights=weights, data=tested, needs_weights=quantized is None)
    networks: dict[str, torch.nn.Module] = {}
    if network.trained:
        networks["float"] = network.model
    # in its place before it is captured: a graph may create tensors where the model was
    model_there = network.model.to(device=place)
    if quantized is not None:
        networks["quantized"] = inputs.quantized(quantized, model_there)
    found: dict[str, dict[str, float]] = {}
    for name, module in networks.items():
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batches = inputs.watched(tested, f"testing {name}", progress)
        for figure, value in api.measured(module, batches, tested.measure).items():
            found.setdefault(figure, {})[name] = value
    write_json(json, {"model": network.name, "data": tested.name, "test_images": tested.count, **found})
    if not to_stdout(json):
        titles = [f"{title(figure)} (%)" for figure in found]
        rows = [
            [f"{network.name}, {name}", *(f"{values[name]:.2f}" for values in found.values()), str(tested.count)]
            for name in networks
        ]
        table([tested.name, *titles, "images"], rows, numeric=True)


def _resumable(ctx: typer.Context, folder: Path) -> None:
    from zsq_ext.core.run import CONFIG

    def words() -> str:
        if not (folder / CONFIG).exists():
            return "stopped before the run began; nothing was kept"
        return f"stopped; the same command with --resume goes on from where {folder} stands"

    on_stop(ctx, words)


def _facts(name: str, result: Result, folder: Path, tested: Any) -> dict[str, Any]:
    """For JSON: every measured figure of the teacher and of the network, and of its best epoch if there were any."""
    measured = {
        figure: {
            "data": tested.name,
            "test_images": tested.count,
            "teacher": result.teacher_accuracy[figure],
            "last": value,
            "best": result.best_accuracy.get(figure),
        }
        for figure, value in result.accuracy.items()
        if tested is not None
    }
    return {
        "model": name,
        **{key: result.config.get(key) for key in ("method", "preset", "profile", "seed")},
        "bits": result.qconfig.label,
        "tuning": result.tuning,
        **measured,
        "quality": result.quality.to_dict(),
        "seconds": result.seconds,
        "out": str(folder),
    }


def _show(method: str, result: Result) -> None:
    from zsq_ext.report.result import summary, title

    quality, by_epochs = result.quality, bool(result.best_accuracy)
    rows: list[tuple[str, float | None, str]] = []
    for figure, value in result.accuracy.items():
        words = title(figure)
        rows.append((f"{words}, teacher (%)", result.teacher_accuracy.get(figure), ".2f"))
        rows.append((f"{words}, last epoch (%)" if by_epochs else f"{words}, quantized (%)", value, ".2f"))
        rows.append((f"{words}, best epoch (%)", result.best_accuracy.get(figure), ".2f"))
    rows += [
        ("agreement with the teacher (%)", quality.agreement, ".2f"),
        ("KL(teacher || student)", quality.kl, ".4g"),
        *((f"SQNR of {path or 'the output'} (dB)", db, ".1f") for path, db in quality.outputs_db.items()),
        ("seconds", result.seconds, ".0f"),
    ]
    shown = [[name, format(value, form)] for name, value, form in rows if value is not None and not isnan(value)]
    table([method, result.qconfig.label], shown, numeric=True)
    typer.echo(summary(result))
