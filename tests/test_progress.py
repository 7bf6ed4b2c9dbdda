"""What a person sees while waiting."""

import io

import pytest

from zsq_ext.core import progress
from zsq_ext.core.progress import QUIET, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_quiet_is_silent_and_standard_output_stays_clean(capsys):
    with QUIET.stage("images", 2) as stage:
        stage.advance()
    QUIET.say("hello")
    assert capsys.readouterr() == ("", "")
    Progress().say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_a_log_gets_plain_lines_at_most_every_ten_seconds(clock):
    file = io.StringIO()
    with Progress(file=file).stage("images", 10) as stage:
        for n in range(10):
            clock[0] += 4
            stage.advance(note=f"loss {n}")
    assert file.getvalue().splitlines() == [
        "images: 3/10 in 12 s, about 28 s left, loss 2",
        "images: 6/10 in 24 s, about 16 s left, loss 5",
        "images: 9/10 in 36 s, about 4 s left, loss 8",
        "images: 10/10 in 40 s, loss 9",
    ]


def test_a_resumed_stage_is_judged_by_its_own_pace(clock):
    file = io.StringIO()
    with Progress(file=file).stage("tuning", 1000, 900) as stage:
        clock[0] += 20
        stage.advance(10)
    assert file.getvalue().splitlines()[0] == "tuning: 910/1000 in 20 s, about 180 s left"


def test_the_last_note_stays(clock):
    file = io.StringIO()
    with Progress(file=file).stage("images", 2) as stage:
        stage.advance(note="loss 3")
        stage.advance()
    assert file.getvalue() == "images: 2/2 in 0 s, loss 3\n"


def test_a_terminal_gets_a_bar():
    file = Terminal()
    with Progress(file=file).stage("tuning", 4, 1) as stage:
        for _ in range(3):
            stage.advance(note="loss 0.25")
    text = file.getvalue()
    assert "tuning" in text
    assert "4/4" in text
    assert "loss 0.25" in text


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_nothing_to_do_says_nothing(file):
    out = file()
    with Progress(file=out).stage("tuning", 0) as stage:
        stage.advance(0)
    assert out.getvalue() == ""


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_an_error_inside_a_stage_comes_out(file):
    def work():
        with Progress(file=file()).stage("tuning", 3) as stage:
            stage.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
