"""Run folders and random streams: kills, damaged files, other configurations, unwritable places."""

import json
import os
import signal
import stat
import time

import pytest
import torch
from safetensors.torch import save as save_plain

from zsq_ext.core import run as runs
from zsq_ext.core.rng import stream
from zsq_ext.core.run import Run, fingerprint, load_tensors, save_tensors, write_atomically

CONFIG = {"seed": 1, "qconfig": {"w_bits": 4, "a_bits": 4}, "shape": (3, 8, 8)}


def test_a_kill_between_write_and_replacement_keeps_the_old_file(tmp_path):
    path = tmp_path / "state"
    write_atomically(path, b"old")
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(path, b"new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]  # what the kill left behind was taken over


def test_a_failed_write_leaves_nothing_beside(tmp_path, monkeypatch):
    path = tmp_path / "state"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_modes_the_user_asked_for(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "state", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o640


def test_resume_semantics(tmp_path):
    out = tmp_path / "a" / "b"
    with pytest.raises(ValueError, match=r"resume must find a run to go on with, got none: there is no .*/a/b/config"):
        Run(out, CONFIG, resume=True)
    assert not out.parent.exists()
    Run(out, CONFIG)
    assert json.loads((out / "config.json").read_text())["config"]["shape"] == [3, 8, 8]
    with pytest.raises(ValueError, match=r"out must be a new folder unless the run in it is to go on .*, got .*/a/b"):
        Run(out, CONFIG)
    Run(out, CONFIG, resume=True)
    with pytest.raises(ValueError, match="resume must come with an out folder, got out=None"):
        Run(None, CONFIG, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_refused_and_left_as_it_was(tmp_path, resume):
    mine = tmp_path / "model.safetensors"
    mine.write_text("precious")
    said = "there is no " if resume else "out must be a new or empty folder, .* with model.safetensors$"
    with pytest.raises(ValueError, match=said):
        Run(tmp_path, CONFIG, resume=resume)
    assert mine.read_text() == "precious"
    assert not (tmp_path / "config.json").exists()
    mine.unlink()
    (tmp_path / ".config.json.partial").write_text("{")  # a run that was killed as it began
    Run(tmp_path, CONFIG)


@pytest.mark.parametrize("resume", [False, True])
def test_another_configuration_is_refused_naming_what_differs(tmp_path, resume):
    Run(tmp_path, CONFIG)
    other = {"seed": 1, "qconfig": {"w_bits": 3, "a_bits": 4}, "shape": (3, 8, 8), "preset": "smoke"}
    with pytest.raises(ValueError, match="must be a new folder or hold this run") as caught:
        Run(tmp_path, other, resume=resume)
    text = str(caught.value)
    assert "qconfig.w_bits is 4 there and 3 here" in text
    assert "preset is None there and 'smoke' here" in text
    assert "a_bits" not in text
    assert "seed" not in text
    assert "\n" not in text


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_way(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="run: out must be a folder that can be written, got"):
        Run(tmp_path / "file" / below, CONFIG)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"config"', "\x00"])
def test_an_unreadable_configuration(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"run: out must hold a readable config.json or none, got"):
        Run(tmp_path, CONFIG, resume=True)


def test_the_seconds_of_all_calls_add_up(tmp_path):
    begin = time.perf_counter()
    run = Run(tmp_path, CONFIG, since=begin - 100)
    assert 100 <= run.seconds < 160
    run.save("images", {})
    time.sleep(0.05)  # kept by nothing
    again = Run(tmp_path, CONFIG, resume=True, since=time.perf_counter() - 1000)
    assert 1100 <= again.seconds < 1160
    again.save("images", {})
    assert 1100 <= Run(tmp_path, CONFIG, resume=True).seconds < 1160
    (tmp_path / "seconds.json").write_text("{")
    assert Run(tmp_path, CONFIG, resume=True).seconds < 60


def test_a_finished_run_takes_no_longer(tmp_path):
    Run(tmp_path, CONFIG).finish(12.5)
    again = Run(tmp_path, CONFIG, resume=True, since=time.perf_counter() - 1000)
    assert again.seconds == 12.5
    again.save("images", {})  # written once more, as it was
    assert Run(tmp_path, CONFIG, resume=True).seconds == 12.5
    Run(None, CONFIG).finish(1.0)


TENSORS = {
    "image": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "scalar": torch.tensor(-0.0),
    "none": torch.empty(0, 3),
    "bits": torch.tensor([True, False]),
    "brain": torch.tensor([1.5, float("nan"), float("inf")], dtype=torch.bfloat16),
    "count": torch.tensor(2**62),
    "strided": torch.arange(12.0).view(3, 4).T,
}


def test_tensors_come_back_bit_for_bit(tmp_path):
    run = Run(tmp_path, CONFIG)
    run.save("state", TENSORS, {"step": 3, "note": "é", "loss": 0.1 + 0.2})
    tensors, info = run.load("state")
    assert {"step": 3, "note": "é", "loss": 0.1 + 0.2}.items() <= info.items()
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].shape == value.shape
        assert tensors[name].dtype == value.dtype
        assert fingerprint({"": tensors[name]}) == fingerprint({"": value})
    run.remove("state")
    run.remove("state")
    assert run.load("state") is None


def test_without_a_folder_nothing_is_kept():
    run = Run(None, CONFIG)
    run.save("state", TENSORS)
    run.write_json("x.json", {})
    run.remove("state")
    assert run.load("state") is None
    assert run.path("state") is None


def test_every_truncation_is_an_error(tmp_path):
    path = tmp_path / "state.safetensors"
    save_tensors(path, TENSORS, {"step": 1})
    whole = path.read_bytes()
    cuts = [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"load: .*state.safetensors must be a complete safetensors file, but: "):
            load_tensors(path)


def foreign(path, kind):
    if kind == "missing":
        return
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("not a tensor in sight\n" * 10)
    elif kind == "pickle":
        torch.save({"x": torch.ones(2)}, path)
    elif kind == "no header of ours":
        path.write_bytes(save_plain({"x": torch.ones(2)}))
    elif kind == "header is no JSON":
        path.write_bytes(save_plain({"x": torch.ones(2)}, metadata={"info": "{"}))
    elif kind == "header is a list":
        path.write_bytes(save_plain({"x": torch.ones(2)}, metadata={"info": "[1]"}))
    elif kind == "header nested too deep":
        path.write_bytes(save_plain({"x": torch.ones(2)}, metadata={"info": "[" * 100_000}))
    elif kind == "header claims 2^63 bytes":
        path.write_bytes((2**63).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "folder",
        "text",
        "pickle",
        "no header of ours",
        "header is no JSON",
        "header is a list",
        "header nested too deep",
        "header claims 2^63 bytes",
    ],
)
def test_foreign_files_are_errors(tmp_path, kind):
    path = tmp_path / "state.safetensors"
    foreign(path, kind)
    message = r"load: .*state.safetensors (must be a complete safetensors file|is a safe)"
    if kind == "missing":
        message = r"load: path must be an existing file, got .*state.safetensors"
    with pytest.raises(ValueError, match=message):
        load_tensors(path)


def test_a_file_of_another_run_is_refused(tmp_path):
    Run(tmp_path / "a", CONFIG).save("state", TENSORS)
    other = Run(tmp_path / "b", {**CONFIG, "seed": 2})
    (tmp_path / "a" / "state.safetensors").rename(tmp_path / "b" / "state.safetensors")
    with pytest.raises(ValueError, match="must belong to this run, got one of another configuration"):
        other.load("state")


def test_json_is_standard_json(tmp_path):
    run = Run(tmp_path, CONFIG)
    run.write_json("x.json", {"sqnr": float("inf"), "rows": [{"kl": float("nan")}, (1.5, "inf", None, True)]})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    value = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert value == {"sqnr": None, "rows": [{"kl": None}, [1.5, "inf", None, True]]}


def test_how_often_to_checkpoint(monkeypatch):
    monkeypatch.delenv("ZSQ_CHECKPOINT_SECONDS", raising=False)
    assert Run(None, {}).checkpoint_seconds == runs.CHECKPOINT_SECONDS
    monkeypatch.setenv("ZSQ_CHECKPOINT_SECONDS", "0")
    assert Run(None, {}).checkpoint_seconds == 0
    assert Run(None, {}, checkpoint_seconds=3).checkpoint_seconds == 3
    for text in ("-1", "soon", "nan"):
        monkeypatch.setenv("ZSQ_CHECKPOINT_SECONDS", text)
        with pytest.raises(ValueError, match=f"ZSQ_CHECKPOINT_SECONDS must be a number >= 0, got '{text}'"):
            Run(None, {})


def test_a_fingerprint_sees_every_difference_but_order():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, 2)}
    word = fingerprint(base)
    assert fingerprint(dict(reversed(base.items()))) == word
    assert fingerprint({name: value.clone() for name, value in base.items()}) == word
    others = [
        {"a": torch.tensor([1.0, 2.0000002]), "b": torch.zeros(2, 2)},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.0, 0.0], [0.0, -0.0]])},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(4)},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, 2, dtype=torch.int32)},
        {"a": torch.tensor([1.0, 2.0]), "c": torch.zeros(2, 2)},
        {"a": torch.tensor([1.0, 2.0])},
    ]
    assert len({word, *map(fingerprint, others)}) == 1 + len(others)


def draw(*key):
    return torch.rand(4, generator=stream(*key)).tolist()


def test_streams_depend_on_seed_name_and_step_and_on_nothing_else():
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (-1, "a", 0), (10**30, "a", 0), (0, "a/0", 0)]
    first = [draw(*key) for key in keys]
    assert len({tuple(numbers) for numbers in first}) == len(keys)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    assert [draw(*key) for key in reversed(keys)] == first[::-1]  # order does not matter
    assert torch.equal(torch.random.get_rng_state(), before)  # and the global stream is not theirs


def test_streams_are_uncorrelated():
    """Neighbouring steps and names: a generator seeded by a plain counter would fail here on weak mixing."""
    rows = torch.stack([torch.randn(4096, generator=stream(0, name, n)) for name in "ab" for n in range(8)])
    correlations = torch.corrcoef(rows).fill_diagonal_(0).abs()
    assert correlations.max() < 6 / 4096**0.5  # six standard errors of a correlation of independent samples
