"""The step runner: guards, history, checkpoints and exact resumption."""

import math

import pytest
import torch

from zsq_ext.core.progress import QUIET
from zsq_ext.core.rng import stream
from zsq_ext.core.run import Run, load_tensors
from zsq_ext.core.steps import READ_EVERY, Diverged, Stage, State, end_stage, run_steps

ADVICE = "Try something else."


class Toy:
    """A noisy quadratic under a real optimizer; everything that changes is in its state."""

    def __init__(self, kind):
        self.x = torch.linspace(-1, 1, 6).requires_grad_()
        self.rate = torch.tensor(0.1)
        if kind == "adam":
            self.optimizer = torch.optim.Adam([self.x], lr=self.rate)
        else:
            self.optimizer = torch.optim.SGD([self.x], lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
        self.steps = []
        self.state = State({"x": self.x, "rate": self.rate}, {"opt": self.optimizer})

    def step(self, n):
        self.steps.append(n)
        noise = torch.randn(6, generator=stream(0, "noise", n))
        near, far = (self.x - 1 + noise).square().mean(), 0.1 * self.x.abs().sum()
        (self.x.grad,) = torch.autograd.grad(near + far, [self.x])
        self.optimizer.step()
        self.rate.mul_(0.97)
        return {"near": near, "far": far}


def go(run, toy, count=35, step=None, **more):
    return run_steps(Stage(run, "toy", 0, QUIET), count, step or toy.step, toy.state, advice=ADVICE, **more)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("stop", [0, 3, 9, 10, 14, 20, 29, 34])
def test_a_resumed_stage_equals_an_unbroken_one(tmp_path, kind, stop, tools):
    whole = Toy(kind)
    history = go(Run(None, {}), whole)

    broken = Toy(kind)

    def stopping(n):
        if n == stop:
            raise tools.Interrupted
        return broken.step(n)

    with pytest.raises(tools.Interrupted):
        go(Run(tmp_path, {}, checkpoint_seconds=0), broken, step=stopping)

    resumed = Toy(kind)
    run = Run(tmp_path, {}, resume=True, checkpoint_seconds=0)
    assert go(run, resumed) == history
    assert resumed.steps[0] == stop - stop % READ_EVERY
    one, two = whole.state.tensors(), resumed.state.tensors()
    assert one.keys() == two.keys()
    assert len(one) > 2  # the optimizer's own state is among them
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert resumed.optimizer.param_groups[0]["lr"] is (resumed.rate if kind == "adam" else 0.05)


def test_the_rate_in_a_tensor_drives_the_optimizer():
    """Also behind a checkpoint: a rate that load_state_dict had copied would no longer be the schedule's."""
    toy = Toy("adam")
    toy.step(0)
    toy.state.load({name: value.clone() for name, value in toy.state.tensors().items()})
    before = toy.x.detach().clone()
    toy.step(1)
    assert not torch.equal(toy.x, before)
    toy.rate.zero_()
    before = toy.x.detach().clone()
    toy.step(2)
    assert torch.equal(toy.x, before)


def test_a_finished_stage_is_not_repeated(tmp_path):
    first = Toy("sgd")
    history = go(Run(tmp_path, {}), first)  # the end is a checkpoint whatever the clock says
    again = Toy("sgd")
    run = Run(tmp_path, {}, resume=True)
    assert go(run, again) == history
    assert again.steps == []
    assert torch.equal(again.x, first.x)
    end_stage(Stage(run, "toy", 0, QUIET))
    assert run.load("checkpoint-toy") is None


def test_history_holds_every_look_and_every_row():
    toy = Toy("sgd")
    history = go(Run(None, {}), toy, after=lambda n: {"epoch": n // 7 + 1} if n % 7 == 6 else None)
    assert [row["step"] for row in history if "near" in row] == [10, 20, 30, 35]
    assert [row for row in history if "epoch" in row] == [{"step": 7 * e, "epoch": e} for e in range(1, 6)]
    assert [row["step"] for row in history] == sorted(row["step"] for row in history)
    replay = Toy("sgd")
    terms = [replay.step(n) for n in range(10)][-1]
    assert history[1] == {"step": 10, **{name: value.item() for name, value in terms.items()}}


def test_no_step_is_no_history_and_no_file(tmp_path):
    assert go(Run(tmp_path, {}), Toy("sgd"), 0) == []
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_divergence_names_step_term_and_advice_and_keeps_the_last_good_checkpoint(tmp_path, value):
    toy = Toy("adam")

    def poisoned(n):
        terms = toy.step(n)
        if n >= 23:
            with torch.no_grad():
                toy.x.fill_(value)
        return {**terms, "far": terms["far"] * (value if n == 23 else 1)}

    with pytest.raises(Diverged, match=r"^toy: loss term 'far' is not finite at step 23\. Try something else\.$"):
        go(Run(tmp_path, {}, checkpoint_seconds=0), toy, step=poisoned)
    tensors, info = load_tensors(tmp_path / "checkpoint-toy.safetensors")
    assert info["step"] == 20
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert all(math.isfinite(row["far"]) for row in info["history"])


def test_the_first_term_to_break_is_named():
    def step(n):
        return {
            "a": torch.tensor(math.nan if n >= 6 else 0.0),
            "b": torch.tensor(math.inf if n >= 4 else 0.0),
            "c": torch.tensor(1.0),
        }

    with pytest.raises(Diverged, match="loss term 'b' is not finite at step 4"):
        run_steps(Stage(Run(None, {}), "s", 0, QUIET), 10, step, State({}), advice="")


def test_terms_that_come_and_go_are_watched_too():
    def step(n):
        return {"a": torch.tensor(math.nan if n == 2 else 0.0)} if n < 5 else {"b": torch.tensor(0.0)}

    with pytest.raises(Diverged, match="loss term 'a' is not finite at step 2"):
        run_steps(Stage(Run(None, {}), "s", 0, QUIET), 10, step, State({}), advice="")


@pytest.mark.parametrize(("when", "count"), [(19, 40), (34, 35)])
def test_a_finite_loss_with_a_broken_gradient_poisons_no_checkpoint(tmp_path, when, count):
    """The square root at zero: the loss is 0, its gradient is not finite, and only the next loss would show it."""
    toy = Toy("sgd")

    def step(n):
        terms = toy.step(n)
        if n == when:
            (toy.x.grad,) = torch.autograd.grad((0 * toy.x).sum().sqrt(), [toy.x])
            toy.optimizer.step()
        return terms

    message = rf"^toy: 'x' is not finite after step {when}, though every loss term was\. Try something else\.$"
    with pytest.raises(Diverged, match=message):
        go(Run(tmp_path, {}, checkpoint_seconds=0), toy, count, step=step)
    tensors, info = load_tensors(tmp_path / "checkpoint-toy.safetensors")
    assert info["step"] == when - when % READ_EVERY
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_the_clock_decides_when_to_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path, {}, checkpoint_seconds=25)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    toy, saved = Toy("sgd"), []

    def step(n):
        now[0] += 1
        return toy.step(n)

    keep = run.save
    monkeypatch.setattr(
        run, "save", lambda name, tensors, info: (saved.append(info["step"]), keep(name, tensors, info))
    )
    go(run, toy, 95, step=step)
    assert saved == [10, 40, 70, 95]  # the first look; then 25 s are over at the third, counted from the save before


@pytest.mark.parametrize(
    ("tensors", "info", "message"),
    [
        ({}, {}, "'toy' must hold a step, 0 to 35, and a history, got step None"),
        ({}, {"step": 36, "history": []}, "got step 36"),
        ({}, {"step": -1, "history": []}, "got step -1"),
        ({}, {"step": 10, "history": []}, r"'x' must be torch.float32 \(6,\), got None"),
        ({"state.x": torch.ones(7)}, {"step": 10, "history": []}, r"'x' must be .* \(6,\), got torch.float32 \(7,\)"),
        ({"state.x": torch.ones(6).double()}, {"step": 10, "history": []}, r"got torch.float64 \(6,\)"),
        ({"state.x": torch.ones(6)}, {"step": 10, "history": []}, "'rate' must be"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, tensors, info, message):
    run = Run(tmp_path, {})
    run.save("checkpoint-toy", {**tensors, "other": torch.ones(1)}, info)
    toy = Toy("sgd")
    before = toy.x.detach().clone()
    with pytest.raises(ValueError, match=message):
        go(run, toy)
    assert torch.equal(toy.x, before)
    assert toy.steps == []
