"""distill_head: its gradients, what it refuses, and torch's machinery."""

import pytest
import torch
from distill_bounds import backward_args, public
from parity import (
    assert_exports,
    assert_raises,
    assert_same,
    compiled,
    every,
    replayed,
)

from zsq_ext.ops import KD_SCALINGS, backend, distill_head, reference
from zsq_ext.ops.cases import heads as cases

CASE = {case.name: case for case in cases.DISTILL}

pytestmark = pytest.mark.usefixtures("poison")


# gradients and torch


@pytest.mark.parametrize("kd", KD_SCALINGS)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_gradcheck(kd, name):
    args = public(cases.DistillCase("", (3, 5), torch.float64, kd, temperature=2.0).args())
    leaves = [args[k].clone().requires_grad_() for k in ("student", "teacher")]
    with backend.backend(name):
        torch.autograd.gradcheck(lambda s, t: distill_head(**{**args, "student": s, "teacher": t})[:2], leaves)


def test_the_teacher_costs_nothing_where_it_is_not_trained(monkeypatch):
    asked = []
    original = reference.distill_head_backward
    monkeypatch.setattr(
        reference, "distill_head_backward", lambda *args: (asked.append((*args[3], *args[5])), original(*args))[1]
    )
    backend.find.cache_clear()
    args = public(CASE["kl_batchmean"].args())
    student, teacher = args["student"].clone().requires_grad_(), args["teacher"].clone().requires_grad_()
    with backend.backend("reference"):
        distill_head(**{**args, "student": student}).kd.backward()
        distill_head(**{**args, "teacher": teacher}).kd.backward()
        out = distill_head(**{**args, "student": student, "teacher": teacher})
        out.ce.backward()
    backend.find.cache_clear()
    assert teacher.grad is not None
    wants = [(kd is not None, ce is not None, *need) for kd, ce, *need in asked]
    assert wants == [(True, False, True, False), (True, False, False, True), (False, True, True, False)]
    assert not any(t.requires_grad for t in out[2:])


def test_double_backward_is_refused():
    args = public(CASE["kl_batchmean"].args())
    student = args["student"].requires_grad_()
    (first,) = torch.autograd.grad(distill_head(**args).kd, student, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^distill_head: a gradient must be taken once"):
        first.sum().backward()


def test_no_gradient_where_none_is_wanted():
    args = public(CASE["kl_batchmean"].args())
    assert not any(t.requires_grad for t in distill_head(**args))
    args["student"].requires_grad_()
    with torch.no_grad():
        assert not any(t.requires_grad for t in distill_head(**args))


def test_autocast_keeps_the_dtype():
    args = public(CASE["kl_batchmean_bf16"].args())
    with torch.autocast("cpu", torch.bfloat16):
        out = distill_head(**args)
    assert (out.kd.dtype, out.ce.dtype) == (torch.float32, torch.float32)


@every(cases.DISTILL_ERRORS)
def test_errors_name_the_argument(case):
    good = {"student": torch.zeros(4, 5), "teacher": torch.zeros(4, 5), "labels": torch.zeros(4, dtype=torch.int64)}
    good |= {"tau": 0.5, "check": True}
    assert_raises(case, distill_head, good)


@pytest.mark.parametrize("name", ["kl_batchmean", "entropy_no_labels", "given", "mse_fp16", "two_classes", "strided"])
def test_opcheck(name, fast):
    where, device = fast
    case = CASE[name]
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    with backend.backend(where):
        torch.library.opcheck(torch.ops.zsq.distill_head.default, case.args(device), test_utils=utilities)
        torch.library.opcheck(
            torch.ops.zsq.distill_head_backward.default, backward_args(case, device), test_utils=utilities
        )


def test_compiles_without_a_break():
    args = public(CASE["given"].args())

    def step(student, teacher):
        out = distill_head(**{**args, "student": student, "teacher": teacher})
        return out.kd + 2 * out.ce, out.right, out.easy

    pairs = [[args[k].clone().requires_grad_() for k in ("student", "teacher")] for _ in range(2)]
    (found, graphs), plain = compiled(step, *pairs[0]), step(*pairs[1])
    assert any("distill_head" in op for op in graphs[0])
    assert_same(found, plain)
    assert_same(torch.autograd.grad(found[0], pairs[0]), torch.autograd.grad(plain[0], pairs[1]))


class Head(torch.nn.Module):
    def forward(self, student, teacher, labels):
        return distill_head(student, teacher, labels, alpha=20.0, tau=0.5)[:3]


def test_export_keeps_the_op():
    student, teacher, labels = CASE["kl_batchmean"].args()[:3]
    assert_exports(Head(), (student, teacher, labels), (student[:5], teacher[:5], labels[:5]), "distill_head")


def test_meta_tensors_have_a_shape_and_no_values():
    logits = torch.empty(4, 10, device="meta")
    out = distill_head(logits, logits, torch.empty(4, dtype=torch.int64, device="meta"))
    assert (out.kd.shape, out.easy.shape, out.right.dtype) == ((), (4,), torch.int64)


# GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_cuda_graph_replays_with_new_contents(name):
    case = CASE["threads"]
    args = case.args("cuda")
    other = case.args("cuda", seed=7)

    def change():
        for t, new in zip(args[:3], other[:3], strict=True):
            t.copy_(new)

    with backend.backend(name):
        out = replayed(lambda: torch.ops.zsq.distill_head(*args), change)
        assert_same(out, torch.ops.zsq.distill_head(*other))
