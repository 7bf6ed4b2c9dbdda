"""distill_head and its backward in Triton. Contract: zsq_ext/ops/reference/heads.py.

A program of distill_head takes one sample, all of its classes at once: a block is a power of two, and 1024 float32
logits of both networks are 16 numbers per thread at 4 warps. Its arithmetic is that of heads.h, where it is explained.
"""

import triton
import triton.language as tl

_WARPS = 4
# Classes that a program of the backward takes at most.
_BLOCK = 1024

_LOG_FLOOR = tl.constexpr(-80.0)
# Columns of a row, [samples, 8] float32: value, base, shift, ce, lse, wrong, right, agree.
_ROW = tl.constexpr(8)


@triton.jit
def _log1p(x):
    # The interpreter has no libdevice. log(y) * x / (y - 1) with y = 1 + x rounded: what y lost cancels (Kahan).
    y = 1.0 + x
    d = y - 1.0
    return tl.where(d == 0.0, x, tl.div_rn(tl.log(y) * x, tl.where(d == 0.0, 1.0, d)))


@triton.jit
def _growth(r):
    """(e^r - 1, e^r - 1 - r): a series where |r| <= 1, where parts would cancel."""
    p = r * (1 / 39916800) + 1 / 3628800
    p = p * r + 1 / 362880
    p = p * r + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 0.5
    p = p * (r * r)
    near = tl.abs(r) <= 1.0
    g = tl.exp(r) - 1.0
    return tl.where(near, p + r, g), tl.where(near, p, g - r)


@triton.jit
def _peak(x, k, valid):
    """(largest value, its first place): NaN is larger than all, as in torch.argmax."""
    nan = (x != x) & valid
    value = tl.max(tl.where(nan | (valid == 0), float("-inf"), x), 0)
    some = tl.max(nan.to(tl.int32), 0) != 0
    is_top = tl.where(some, nan, (x == value) & valid)
    at = tl.min(tl.where(is_top, k, 2147483647), 0)
    return tl.where(some, float("nan"), value), at


@triton.jit
def _odds(x, top, others):
    """(log-sum-exp, how likely the label is wrong, its cross-entropy) from its logit and the other classes' sum."""
    below = x - top
    total = others + tl.exp(below)
    log_total = tl.log(total)
    return top + log_total, tl.div_rn(others, total), tl.where(x == top, _log1p(others), log_total - below)


@triton.jit
def _ratio(s, t, temperature, base, shift):
    log_p = tl.div_rn(t, temperature) - base
    bounded = log_p < _LOG_FLOOR
    far = (tl.div_rn(s, temperature) - (base + shift)) - _LOG_FLOOR
    r = tl.where(bounded, far, tl.div_rn(s - t, temperature) - shift)
    return tl.exp(tl.where(bounded, _LOG_FLOOR, log_p)), r, bounded


@triton.jit
def _label(labels_ptr, row, classes, LABELLED: tl.constexpr):
    """(the label, whether there is no such class)."""
    label = tl.load(labels_ptr + row) if LABELLED else tl.full([], -1, tl.int64)
    return label, (label < 0) | (label >= classes)


@triton.jit
def _distill_kernel(
    student_ptr,  # [samples, classes]
    teacher_ptr,  # [samples, classes]
    labels_ptr,  # [samples] int64, where LABELLED
    given_ptr,  # [samples] uint8, where TRUST is "given"
    rows_ptr,  # [samples, 8] float32
    easy_ptr,  # [samples] uint8
    classes,
    temperature,
    tau,
    KD: tl.constexpr,
    TRUST: tl.constexpr,
    LABELLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    valid = k < classes
    s = tl.load(student_ptr + row * classes + k, mask=valid, other=0.0).to(tl.float32)
    t = tl.load(teacher_ptr + row * classes + k, mask=valid, other=0.0).to(tl.float32)
    s_top, s_at = _peak(s, k, valid)
    t_top, t_at = _peak(t, k, valid)
    d = s - t
    zero = tl.full([], 0.0, tl.float32)
    base, shift = zero, zero
    if KD == "kl":
        s_mass = tl.exp(tl.div_rn(s, temperature) - tl.div_rn(s_top, temperature))
        t_mass = tl.exp(tl.div_rn(t, temperature) - tl.div_rn(t_top, temperature))
        base = tl.div_rn(t_top, temperature) + tl.log(tl.sum(tl.where(valid, t_mass, 0.0), 0))
        shift = tl.div_rn(s_top, temperature) + tl.log(tl.sum(tl.where(valid, s_mass, 0.0), 0)) - base
        p, r, _ = _ratio(s, t, temperature, base, shift)
        growth, excess = _growth(r)
        value = tl.sum(tl.where(valid, p * excess, 0.0), 0)
        drift = tl.sum(tl.where(valid, p * growth, 0.0), 0)
        shift = shift + drift
        value = value - 0.5 * (drift * drift)
        value = tl.where(value < 0.0, 0.0, value)
    elif KD == "mse":
        value = tl.sum(tl.where(valid, d * d, 0.0), 0)
    else:
        u = tl.div_rn(d, temperature)
        top = tl.max(tl.where(valid, u, float("-inf")), 0)
        base = top + tl.log(tl.sum(tl.where(valid, tl.exp(u - top), 0.0), 0))
        log_p = u - base
        value = tl.sum(tl.where(valid, tl.exp(log_p) * log_p, 0.0), 0)
    label, outside = _label(labels_ptr, row, classes, LABELLED)
    ce, lse, wrong = zero, zero, zero
    easy = tl.full([], 0, tl.int32) != 0
    if LABELLED:
        others = valid & (k != label)
        at = row * classes + tl.where(outside, 0, label)
        nan = float("nan")
        x = tl.where(outside, nan, tl.load(student_ptr + at).to(tl.float32))
        lse, wrong, ce = _odds(x, s_top, tl.sum(tl.where(others, tl.exp(s - s_top), 0.0), 0))
        if TRUST == "given":
            easy = tl.load(given_ptr + row) != 0
        elif TRUST == "all":
            easy = easy == 0
        else:
            x = tl.where(outside, nan, tl.load(teacher_ptr + at).to(tl.float32))
            _, delta, _ = _odds(x, t_top, tl.sum(tl.where(others, tl.exp(t - t_top), 0.0), 0))
            easy = delta < tau if TRUST == "below" else delta <= tau
        ce = tl.where(easy | outside, ce, 0.0)
    tl.store(easy_ptr + row, easy.to(tl.uint8))
    out = rows_ptr + row * _ROW
    tl.store(out, value)
    tl.store(out + 1, base)
    tl.store(out + 2, shift)
    tl.store(out + 3, ce)
    tl.store(out + 4, lse)
    tl.store(out + 5, wrong)
    tl.store(out + 6, ((s_at.to(tl.int64) == label) & LABELLED).to(tl.float32))
    tl.store(out + 7, (s_at == t_at).to(tl.float32))


@triton.jit
def _finish_kernel(
    rows_ptr,  # [samples, 8] float32
    easy_ptr,  # [samples] uint8
    kd_ptr,  # one float32, as ce
    ce_ptr,
    counts_ptr,  # 3 int64: right, agreeing and easy samples
    samples,
    kd_weight,
    ce_weight,
    BLOCK: tl.constexpr,
):
    kd = tl.zeros([BLOCK], tl.float64)
    ce = tl.zeros([BLOCK], tl.float64)
    right = tl.zeros([BLOCK], tl.int64)
    agree = tl.zeros([BLOCK], tl.int64)
    trusted = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, samples, BLOCK):
        row = begin + tl.arange(0, BLOCK).to(tl.int64)
        valid = row < samples
        kd += tl.load(rows_ptr + row * _ROW, mask=valid, other=0.0).to(tl.float64)
        ce += tl.load(rows_ptr + row * _ROW + 3, mask=valid, other=0.0).to(tl.float64)
        right += tl.load(rows_ptr + row * _ROW + 6, mask=valid, other=0.0).to(tl.int64)
        agree += tl.load(rows_ptr + row * _ROW + 7, mask=valid, other=0.0).to(tl.int64)
        trusted += tl.load(easy_ptr + row, mask=valid, other=0).to(tl.int64)
    tl.store(kd_ptr, (tl.sum(kd, 0) * kd_weight).to(tl.float32))
    tl.store(ce_ptr, (tl.sum(ce, 0) * ce_weight).to(tl.float32))
    tl.store(counts_ptr, tl.sum(right, 0))
    tl.store(counts_ptr + 1, tl.sum(agree, 0))
    tl.store(counts_ptr + 2, tl.sum(trusted, 0))


def distill_head(
    student,
    teacher,
    labels,
    given,
    rows,
    easy,
    kd,
    ce,
    counts,
    samples,
    classes,
    temperature,
    tau,
    weights,
    form,
    trust,
):
    """A row per sample, and their sums. labels and given may be None."""
    if samples:
        _distill_kernel[(samples,)](
            *(student, teacher, rows if labels is None else labels, easy if given is None else given, rows, easy),
            *(classes, float(temperature), float(tau)),
            KD=form,
            TRUST=trust,
            LABELLED=labels is not None,
            BLOCK=triton.next_power_of_2(classes),
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    _finish_kernel[(1,)](
        rows, easy, kd, ce, counts, samples, *weights, BLOCK=256, num_warps=_WARPS, enable_fp_fusion=False
    )


@triton.jit
def _distill_backward_kernel(
    student_ptr,  # [samples, classes], as both gradients
    teacher_ptr,
    labels_ptr,  # [samples] int64
    easy_ptr,  # [samples] uint8
    rows_ptr,  # [samples, 8] float32
    grad_kd_ptr,  # one float32, as grad_ce
    grad_ce_ptr,
    ds_ptr,
    dt_ptr,
    classes,
    temperature,
    kd_weight,
    ce_weight,
    KD: tl.constexpr,
    HAS_KD: tl.constexpr,
    HAS_CE: tl.constexpr,
    NEED_STUDENT: tl.constexpr,
    NEED_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = k < classes
    i = row * classes + k
    s = tl.load(student_ptr + i, mask=valid, other=0.0).to(tl.float32)
    t = tl.load(teacher_ptr + i, mask=valid, other=0.0).to(tl.float32)
    base = tl.load(rows_ptr + row * _ROW + 1)
    value = tl.load(rows_ptr + row * _ROW)
    ds = tl.zeros([BLOCK], tl.float32)
    dt = ds
    if HAS_KD:
        pull = tl.load(grad_kd_ptr) * kd_weight
        if KD == "kl":
            p, r, bounded = _ratio(s, t, temperature, base, tl.load(rows_ptr + row * _ROW + 2))
            growth, _ = _growth(r)
            ds = p * growth
            dt = tl.where(bounded, 0.0, p * (-r - value))
        elif KD == "mse":
            ds = 2.0 * (s - t)
            dt = -ds
        else:
            log_p = tl.div_rn(s - t, temperature) - base
            ds = tl.exp(log_p) * (log_p - value)
            dt = -ds
        ds, dt = pull * ds, pull * dt
    if HAS_CE:
        pull = tl.where(tl.load(easy_ptr + row) != 0, tl.load(grad_ce_ptr) * ce_weight, 0.0)
        soft = tl.exp(s - tl.load(rows_ptr + row * _ROW + 4))
        ds += pull * tl.where(k == tl.load(labels_ptr + row), -tl.load(rows_ptr + row * _ROW + 5), soft)
    if NEED_STUDENT:
        tl.store(ds_ptr + i, ds.to(ds_ptr.dtype.element_ty), mask=valid)
    if NEED_TEACHER:
        tl.store(dt_ptr + i, dt.to(dt_ptr.dtype.element_ty), mask=valid)


def distill_head_backward(
    student, teacher, labels, easy, rows, grad_kd, grad_ce, ds, dt, samples, classes, temperature, weights, form
):
    """Those of the gradients that are not None. labels, grad_kd and grad_ce may be None."""
    if samples == 0:
        return
    block = min(triton.next_power_of_2(classes), _BLOCK)
    kd_weight, ce_weight = weights
    pointers = student, teacher, labels, easy, rows, grad_kd, grad_ce, ds, dt
    _distill_backward_kernel[samples, triton.cdiv(classes, block)](
        *(rows if p is None else p for p in pointers),
        classes,
        float(temperature),
        kd_weight if form == "mse" else kd_weight / temperature,
        ce_weight,
        KD=form,
        HAS_KD=grad_kd is not None,
        HAS_CE=grad_ce is not None and labels is not None,
        NEED_STUDENT=ds is not None,
        NEED_TEACHER=dt is not None,
        BLOCK=block,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
