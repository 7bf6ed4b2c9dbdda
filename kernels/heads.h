// The head of distillation for one sample, as zsq_ext/ops/reference/heads.py defines it. Shared by the CPU and CUDA.
//
// head_row needs three passes over the classes, each a reduction, which a Team runs its own way: in a loop, eight at a
// time, or by the threads of a warp. What one class adds to them, and what becomes of the sums, stands here.
#pragma once

#include <cstdint>

#include "arith.h"

namespace zsq {

// The codes that zsq_ext passes; the two scalings of KL are one kernel. zsq_ext/ops/native/heads.py holds the same.
enum class Kd : int { kl = 0, mse = 1, entropy = 2 };
// How a sample becomes easy: always, delta < tau, delta <= tau, or it has been decided.
enum class Trust : int { all = 0, below = 1, up_to = 2, given = 3 };

// Of log-probabilities of the teacher: a smaller one's inverse would not be a float.
constexpr int kLogFloor = -80;

// The library's, for any argument: infinities and what overflows or vanishes included. Backends differ in the last
// bits.
#ifdef __CUDA_ARCH__
ZSQ_HD float exp_any(float a) { return expf(a); }
ZSQ_HD float log_any(float a) { return logf(a); }
ZSQ_HD float log1p_any(float a) { return log1pf(a); }
#else
template <class T>
ZSQ_HD T exp_any(T a) {
  return std::exp(a);
}
template <class T>
ZSQ_HD T log_any(T a) {
  return std::log(a);
}
template <class T>
ZSQ_HD T log1p_any(T a) {
  return std::log1p(a);
}
#endif

// Terms of the series of e^r - 1 - r that T needs for |r| <= 1: what is left out is below 1e-9 and 1e-18 of the sum.
template <class T>
constexpr int kTerms = sizeof(T) == 4 ? 10 : 18;

// 1 / (k + 2)!, the series' coefficients from r^2 on.
template <class T>
ZSQ_HD T coefficient(int k) {
  constexpr double c[18] = {1.0 / 2,
                            1.0 / 6,
                            1.0 / 24,
                            1.0 / 120,
                            1.0 / 720,
                            1.0 / 5040,
                            1.0 / 40320,
                            1.0 / 362880,
                            1.0 / 3628800,
                            1.0 / 39916800,
                            1.0 / 479001600,
                            1.0 / 6227020800,
                            1.0 / 87178291200,
                            1.0 / 1307674368000,
                            1.0 / 20922789888000,
                            1.0 / 355687428096000,
                            1.0 / 6402373705728000,
                            1.0 / 121645100408832000};
  return static_cast<T>(c[k]);
}

// e^r - 1 and e^r - 1 - r, a few units in the last place off at any r: where parts would cancel there is a series.
template <class T>
struct Growth {
  T growth, excess;
};

template <class T>
ZSQ_HD Growth<T> growth(T r) {
  if (!(r >= T(-1) && r <= T(1))) {
    const T g = sub(exp_any(r), T(1));
    return {g, sub(g, r)};
  }
  T p = coefficient<T>(kTerms<T> - 1);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int k = kTerms<T> - 2; k >= 0; --k) p = add(mul(p, r), coefficient<T>(k));
  p = mul(p, mul(r, r));
  return {add(p, r), p};
}

// What the backward needs of a sample, and what is summed over samples: a row of the op's output `rows`.
template <class T>
struct HeadRow {
  T value;         // the divergence's sum over classes
  T base;          // its normaliser: log-sum-exp of teacher / temperature (kl), of the difference's (entropy)
  T shift;         // kl: the student's minus the teacher's
  T ce;            // of the label, 0 where it is not trusted
  T lse;           // of the student's logits
  T wrong;         // 1 - softmax(student)[label]
  T right, agree;  // 0 or 1
};

template <class T>
struct HeadSpec {
  T temperature, tau;
  Trust trust;
  bool labelled;

  ZSQ_HD bool difficult() const { return labelled && (trust == Trust::below || trust == Trust::up_to); }
};

// The largest value and its place: NaN is larger than all, and of equals the first counts, as in torch.argmax.
template <class T>
struct Peak {
  T value;
  int64_t at;
};

template <class T>
ZSQ_HD Peak<T> higher(const Peak<T>& a, const Peak<T>& b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  const bool tie = a.value == b.value || (a_nan && b_nan);
  const bool second = tie ? b.at < a.at : (b_nan || (!a_nan && b.value > a.value));
  return second ? b : a;
}

// First pass. `difference` is that of (student - teacher) / temperature, under entropy.
template <class T>
struct Peaks {
  Peak<T> student, teacher;
  T difference;
};

// Second pass: sums of exponentials below the peaks. The last two, at temperature 1, leave the label out.
template <class T>
struct Masses {
  T student, teacher, student_wrong, teacher_wrong;
};

// Third pass. `drift` is the sum of p (e^r - 1), 0 but for rounding.
template <class T>
struct Divergence {
  T value, drift;
};

template <Kd kKd, class T>
ZSQ_HD void add_masses(T s, T t, bool is_label, const Peaks<T>& top, const HeadSpec<T>& spec, Masses<T>& sums) {
  const T temperature = spec.temperature;
  if (kKd == Kd::kl) {
    const T s_top = div(top.student.value, temperature), t_top = div(top.teacher.value, temperature);
    sums.student = add(sums.student, exp_any(sub(div(s, temperature), s_top)));
    sums.teacher = add(sums.teacher, exp_any(sub(div(t, temperature), t_top)));
  } else if (kKd == Kd::entropy) {
    sums.student = add(sums.student, exp_any(sub(div(sub(s, t), temperature), top.difference)));
  }
  if (spec.labelled && !is_label) {
    sums.student_wrong = add(sums.student_wrong, exp_any(sub(s, top.student.value)));
    if (spec.difficult()) sums.teacher_wrong = add(sums.teacher_wrong, exp_any(sub(t, top.teacher.value)));
  }
}

// A class under the two distributions: its probability p, bounded from below, and the log-ratio r of the student's.
template <class T>
struct Ratio {
  T p, r;
  bool bounded;
};

template <class T>
ZSQ_HD Ratio<T> ratio(T s, T t, T temperature, T base, T shift) {
  const T log_p = sub(div(t, temperature), base);
  const bool bounded = log_p < T(kLogFloor);
  const T r =
      bounded ? sub(sub(div(s, temperature), add(base, shift)), T(kLogFloor)) : sub(div(sub(s, t), temperature), shift);
  return {exp_any(bounded ? T(kLogFloor) : log_p), r, bounded};
}

template <Kd kKd, class T>
ZSQ_HD void add_divergence(T s, T t, T temperature, T base, T shift, Divergence<T>& sums) {
  if (kKd == Kd::kl) {
    const Ratio<T> q = ratio(s, t, temperature, base, shift);
    const Growth<T> g = growth(q.r);
    sums.value = add(sums.value, mul(q.p, g.excess));
    sums.drift = add(sums.drift, mul(q.p, g.growth));
  } else if (kKd == Kd::mse) {
    const T d = sub(s, t);
    sums.value = add(sums.value, mul(d, d));
  } else {
    const T log_p = sub(div(sub(s, t), temperature), base);
    sums.value = add(sums.value, mul(exp_any(log_p), log_p));
  }
}

// How likely it is that the label is wrong. `others` is the sum over the other classes; NaN for x, where there is no
// such label, makes everything NaN.
template <class T>
struct Odds {
  T lse, wrong, ce;
};

template <class T>
ZSQ_HD Odds<T> odds(T x, T top, T others) {
  const T below = sub(x, top), all = add(others, exp_any(below)), log_all = log_any(all);
  return {add(top, log_all), div(others, all), x == top ? log1p_any(others) : sub(log_all, below)};
}

// One sample. team.peaks, team.masses and team.divergence run the passes, team.student(k) and team.teacher(k) read a
// logit. `easy` comes as what has been decided, and leaves as what holds.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // a team of CUDA threads runs on the device only
#endif
template <Kd kKd, class T, class Team>
ZSQ_HD HeadRow<T> head_row(const Team& team, const HeadSpec<T>& spec, int64_t label, bool& easy) {
  HeadRow<T> row{};
  const Peaks<T> top = team.template peaks<kKd>(spec);
  row.right = T(spec.labelled && top.student.at == label);
  row.agree = T(top.student.at == top.teacher.at);
  Masses<T> mass{};
  if (kKd != Kd::mse || spec.labelled) mass = team.template masses<kKd>(top, spec, label);
  if (kKd == Kd::kl) {
    row.base = add(div(top.teacher.value, spec.temperature), log_any(mass.teacher));
    row.shift = sub(add(div(top.student.value, spec.temperature), log_any(mass.student)), row.base);
  } else if (kKd == Kd::entropy) {
    row.base = add(top.difference, log_any(mass.student));
  }
  const Divergence<T> d = team.template divergence<kKd>(spec, row.base, row.shift);
  row.value = d.value;
  if (kKd == Kd::kl) {
    // One step of Newton's towards the shift under which the student's probabilities sum to one exactly: rounding in
    // the two normalisers is far larger than in their difference, and a KL of 1e-9 would feel it.
    row.shift = add(row.shift, d.drift);
    row.value = sub(d.value, mul(T(0.5), mul(d.drift, d.drift)));
    row.value = row.value < T(0) ? T(0) : row.value;
  }
  if (!spec.labelled) {
    easy = false;
    return row;
  }
  const bool outside = label < 0 || label >= team.classes();
  const T nan = T(NAN);
  const Odds<T> own = odds(outside ? nan : team.student(label), top.student.value, mass.student_wrong);
  if (spec.difficult()) {
    const T x = outside ? nan : team.teacher(label);
    const T delta = odds(x, top.teacher.value, mass.teacher_wrong).wrong;
    easy = spec.trust == Trust::below ? delta < spec.tau : delta <= spec.tau;
  } else if (spec.trust == Trust::all) {
    easy = true;
  }
  row.lse = own.lse;
  row.wrong = own.wrong;
  row.ce = easy || outside ? own.ce : T(0);
  return row;
}

// What reaches the gradients of one sample: factors of the divergence's and of the cross-entropy's slope.
template <class T>
struct HeadPull {
  T kd, ce;
};

template <class T>
struct HeadSlope {
  T student, teacher;
};

// The divergence is of quotients by the temperature, but for mse.
template <Kd kKd, class T>
ZSQ_HD T kd_pull(T grad, T weight, T temperature) {
  return mul(grad, kKd == Kd::mse ? weight : div(weight, temperature));
}

template <Kd kKd, class T>
ZSQ_HD HeadSlope<T> kd_slope(T s, T t, T temperature, const HeadRow<T>& row) {
  if (kKd == Kd::kl) {
    const Ratio<T> q = ratio(s, t, temperature, row.base, row.shift);
    return {mul(q.p, growth(q.r).growth), q.bounded ? T(0) : mul(q.p, sub(-q.r, row.value))};
  }
  T slope;
  if (kKd == Kd::mse) {
    slope = mul(T(2), sub(s, t));
  } else {
    const T log_p = sub(div(sub(s, t), temperature), row.base);
    slope = mul(exp_any(log_p), sub(log_p, row.value));
  }
  return {slope, -slope};
}

template <class T>
ZSQ_HD T ce_slope(T s, bool is_label, const HeadRow<T>& row) {
  return is_label ? -row.wrong : exp_any(sub(s, row.lse));
}

// The gradients of both logits of one class.
template <Kd kKd, class T>
ZSQ_HD HeadSlope<T> head_slope(T s, T t, bool is_label, T temperature, const HeadRow<T>& row, const HeadPull<T>& pull,
                               bool has_kd, bool has_ce) {
  HeadSlope<T> out{T(0), T(0)};
  if (has_kd) {
    const HeadSlope<T> d = kd_slope<kKd>(s, t, temperature, row);
    out = {mul(pull.kd, d.student), mul(pull.kd, d.teacher)};
  }
  if (has_ce) out.student = add(out.student, mul(pull.ce, ce_slope(s, is_label, row)));
  return out;
}

}  // namespace zsq
