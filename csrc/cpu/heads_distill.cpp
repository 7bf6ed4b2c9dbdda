#include <algorithm>
#include <type_traits>

#include "csrc/cpu/half.h"
#include "csrc/cpu/heads.h"
#include "csrc/cpu/heads8.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd.h"

namespace zsq {
namespace {

// Logits that one thread takes at once: 30 to 60 us of exponentials.
constexpr int64_t kGrain = 1 << 12;

int64_t grain_of(int64_t classes) { return std::max<int64_t>(1, kGrain / classes); }

// One sample's logits, and the passes of head_row over them.
template <class T, class C>
struct ScalarTeam {
  const T* s;
  const T* t;
  int64_t n;

  int64_t classes() const { return n; }
  C student(int64_t k) const { return widen(s[k]); }
  C teacher(int64_t k) const { return widen(t[k]); }

  template <Kd kKd>
  void peaks_from(int64_t k, const HeadSpec<C>& spec, Peaks<C>& top) const {
    for (; k < n; ++k) {
      top.student = higher(top.student, {student(k), k});
      top.teacher = higher(top.teacher, {teacher(k), k});
      if (kKd == Kd::entropy) top.difference = std::max(top.difference, (student(k) - teacher(k)) / spec.temperature);
    }
  }

  template <Kd kKd>
  Peaks<C> peaks(const HeadSpec<C>& spec) const {
    Peaks<C> top{{student(0), 0}, {teacher(0), 0}, (student(0) - teacher(0)) / spec.temperature};
    peaks_from<kKd>(1, spec, top);
    return top;
  }

  template <Kd kKd>
  Masses<C> masses(const Peaks<C>& top, const HeadSpec<C>& spec, int64_t label) const {
    Masses<C> sums{};
    for (int64_t k = 0; k < n; ++k) add_masses<kKd>(student(k), teacher(k), k == label, top, spec, sums);
    return sums;
  }

  template <Kd kKd>
  Divergence<C> divergence(const HeadSpec<C>& spec, C base, C shift) const {
    Divergence<C> sums{};
    for (int64_t k = 0; k < n; ++k) add_divergence<kKd>(student(k), teacher(k), spec.temperature, base, shift, sums);
    return sums;
  }
};

// Where the gradients of one sample go; absent ones are null.
template <class T>
struct Slopes {
  T* student;
  T* teacher;
};

template <Kd kKd, class T, class C>
void slopes_from(int64_t k, const ScalarTeam<T, C>& x, int64_t label, C temperature, const HeadRow<C>& row,
                 const HeadPull<C>& pull, bool has_kd, bool has_ce, const Slopes<T>& out) {
  for (; k < x.n; ++k) {
    const HeadSlope<C> d =
        head_slope<kKd>(x.student(k), x.teacher(k), k == label, temperature, row, pull, has_kd, has_ce);
    if (out.student) narrow(d.student, out.student[k]);
    if (out.teacher) narrow(d.teacher, out.teacher[k]);
  }
}

#ifdef ZSQ_HAS_AVX2

// Eight classes at a time and the rest one by one. There are at least eight.
template <class T>
struct Avx2Team : ScalarTeam<T, float> {
  using Base = ScalarTeam<T, float>;

  template <Kd kKd>
  ZSQ_AVX2 Peaks<float> peaks(const HeadSpec<float>& spec) const {
    const __m256 temperature = all8(spec.temperature);
    const __m256i first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    Peak8 s{load8(this->s), first}, t{load8(this->t), first};
    __m256 difference = _mm256_sub_ps(s.value, t.value);
    int64_t k = 8;
    for (; k + 8 <= this->n; k += 8) {
      const __m256 a = load8(this->s + k), b = load8(this->t + k);
      const __m256i at = _mm256_add_epi32(first, _mm256_set1_epi32(static_cast<int>(k)));
      s.meet(a, at);
      t.meet(b, at);
      if (kKd == Kd::entropy) difference = _mm256_max_ps(difference, _mm256_sub_ps(a, b));
    }
    alignas(32) float u[8];
    _mm256_store_ps(u, _mm256_div_ps(difference, temperature));
    Peaks<float> top{s.highest(), t.highest(), *std::max_element(u, u + 8)};
    this->template peaks_from<kKd>(k, spec, top);
    return top;
  }

  template <Kd kKd>
  ZSQ_AVX2 Masses<float> masses(const Peaks<float>& top, const HeadSpec<float>& spec, int64_t label) const {
    const __m256 temperature = all8(spec.temperature), difference = all8(top.difference);
    const __m256 s_top = all8(top.student.value), t_top = all8(top.teacher.value);
    const __m256 s_cool = _mm256_div_ps(s_top, temperature), t_cool = _mm256_div_ps(t_top, temperature);
    const bool difficult = spec.difficult();
    __m256 s_sum = _mm256_setzero_ps(), t_sum = s_sum, s_wrong = s_sum, t_wrong = s_sum;
    int64_t k = 0;
    for (; k + 8 <= this->n; k += 8) {
      const __m256 s = load8(this->s + k), t = load8(this->t + k);
      if (kKd == Kd::kl) {
        s_sum = _mm256_add_ps(s_sum, exp8(_mm256_sub_ps(_mm256_div_ps(s, temperature), s_cool)));
        t_sum = _mm256_add_ps(t_sum, exp8(_mm256_sub_ps(_mm256_div_ps(t, temperature), t_cool)));
      } else if (kKd == Kd::entropy) {
        const __m256 u = _mm256_div_ps(_mm256_sub_ps(s, t), temperature);
        s_sum = _mm256_add_ps(s_sum, exp8(_mm256_sub_ps(u, difference)));
      }
      if (!spec.labelled) continue;
      const __m256 here = lane8(label - k);
      s_wrong = _mm256_add_ps(s_wrong, _mm256_andnot_ps(here, exp8(_mm256_sub_ps(s, s_top))));
      if (difficult) t_wrong = _mm256_add_ps(t_wrong, _mm256_andnot_ps(here, exp8(_mm256_sub_ps(t, t_top))));
    }
    Masses<float> sums{sum8(s_sum), sum8(t_sum), sum8(s_wrong), sum8(t_wrong)};
    for (; k < this->n; ++k) add_masses<kKd>(this->student(k), this->teacher(k), k == label, top, spec, sums);
    return sums;
  }

  template <Kd kKd>
  ZSQ_AVX2 Divergence<float> divergence(const HeadSpec<float>& spec, float base, float shift) const {
    const __m256 temperature = all8(spec.temperature), base8 = all8(base), shift8 = all8(shift);
    __m256 value = _mm256_setzero_ps(), drift = value;
    int64_t k = 0;
    for (; k + 8 <= this->n; k += 8) {
      const __m256 s = load8(this->s + k), t = load8(this->t + k), d = _mm256_sub_ps(s, t);
      if (kKd == Kd::kl) {
        const Ratio8 q = ratio8(s, t, temperature, base8, shift8);
        const Growth8 g = growth8(q.r);
        value = _mm256_add_ps(value, _mm256_mul_ps(q.p, g.excess));
        drift = _mm256_add_ps(drift, _mm256_mul_ps(q.p, g.growth));
      } else if (kKd == Kd::mse) {
        value = _mm256_add_ps(value, _mm256_mul_ps(d, d));
      } else {
        const __m256 log_p = _mm256_sub_ps(_mm256_div_ps(d, temperature), base8);
        value = _mm256_add_ps(value, _mm256_mul_ps(exp8(log_p), log_p));
      }
    }
    Divergence<float> sums{sum8(value), sum8(drift)};
    for (; k < this->n; ++k) {
      add_divergence<kKd>(this->student(k), this->teacher(k), spec.temperature, base, shift, sums);
    }
    return sums;
  }
};

template <Kd kKd, class T>
ZSQ_AVX2 void slopes_avx2(const ScalarTeam<T, float>& x, int64_t label, float temperature, const HeadRow<float>& row,
                          const HeadPull<float>& pull, bool has_kd, bool has_ce, const Slopes<T>& out) {
  const __m256 temperature8 = all8(temperature), base = all8(row.base), shift = all8(row.shift);
  const __m256 value = all8(row.value), lse = all8(row.lse), minus = all8(-0.0f);
  int64_t k = 0;
  for (; k + 8 <= x.n; k += 8) {
    const __m256 s = load8(x.s + k), t = load8(x.t + k), d = _mm256_sub_ps(s, t);
    __m256 ds = _mm256_setzero_ps(), dt = ds;
    if (has_kd) {
      if (kKd == Kd::kl) {
        const Ratio8 q = ratio8(s, t, temperature8, base, shift);
        ds = _mm256_mul_ps(q.p, growth8(q.r).growth);
        dt = _mm256_mul_ps(q.p, _mm256_sub_ps(_mm256_xor_ps(q.r, minus), value));
        dt = _mm256_andnot_ps(q.bounded, dt);
      } else {
        if (kKd == Kd::mse) {
          ds = _mm256_mul_ps(all8(2.0f), d);
        } else {
          const __m256 log_p = _mm256_sub_ps(_mm256_div_ps(d, temperature8), base);
          ds = _mm256_mul_ps(exp8(log_p), _mm256_sub_ps(log_p, value));
        }
        dt = _mm256_xor_ps(ds, minus);
      }
      ds = _mm256_mul_ps(all8(pull.kd), ds);
      dt = _mm256_mul_ps(all8(pull.kd), dt);
    }
    if (has_ce) {
      const __m256 soft = _mm256_blendv_ps(exp8(_mm256_sub_ps(s, lse)), all8(-row.wrong), lane8(label - k));
      ds = _mm256_add_ps(ds, _mm256_mul_ps(all8(pull.ce), soft));
    }
    if (out.student) store8(out.student + k, ds);
    if (out.teacher) store8(out.teacher + k, dt);
  }
  slopes_from<kKd>(k, x, label, temperature, row, pull, has_kd, has_ce, out);
}

#endif

template <Kd kKd, class T, class C>
HeadRow<C> row_of(const ScalarTeam<T, C>& x, const HeadSpec<C>& spec, int64_t label, bool& easy, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd && x.n >= 8) return head_row<kKd>(Avx2Team<T>{x}, spec, label, easy);
  }
#endif
  (void)simd;
  return head_row<kKd>(x, spec, label, easy);
}

template <Kd kKd, class T, class C>
void slopes(const ScalarTeam<T, C>& x, int64_t label, C temperature, const HeadRow<C>& row, const HeadPull<C>& pull,
            bool has_kd, bool has_ce, const Slopes<T>& out, bool simd) {
#ifdef ZSQ_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if (simd) return slopes_avx2<kKd>(x, label, temperature, row, pull, has_kd, has_ce, out);
  }
#endif
  (void)simd;
  slopes_from<kKd>(0, x, label, temperature, row, pull, has_kd, has_ce, out);
}

template <Kd kKd, class T, class C>
void run(const DistillHeadArgs& a, int threads) {
  const T *student = static_cast<const T*>(a.student), *teacher = static_cast<const T*>(a.teacher);
  HeadRow<C>* const rows = static_cast<HeadRow<C>*>(a.rows);
  const HeadSpec<C> spec{static_cast<C>(a.temperature), static_cast<C>(a.tau), a.trust, a.labels != nullptr};
  const bool simd = simd_enabled();
  parallel_for(a.samples, grain_of(a.classes), threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const ScalarTeam<T, C> x{student + b * a.classes, teacher + b * a.classes, a.classes};
      bool easy = a.given && a.given[b];
      rows[b] = row_of<kKd>(x, spec, spec.labelled ? a.labels[b] : -1, easy, simd);
      a.easy[b] = easy;
    }
  });
  double kd = 0, ce = 0;
  int64_t right = 0, agree = 0, trusted = 0;
  for (int64_t b = 0; b < a.samples; ++b) {
    kd += rows[b].value;
    ce += rows[b].ce;
    right += rows[b].right != 0;
    agree += rows[b].agree != 0;
    trusted += a.easy[b];
  }
  *static_cast<C*>(a.kd) = static_cast<C>(a.kd_weight * kd);
  *static_cast<C*>(a.ce) = static_cast<C>(a.ce_weight * ce);
  a.counts[0] = right;
  a.counts[1] = agree;
  a.counts[2] = trusted;
}

template <Kd kKd, class T, class C>
void run(const DistillHeadBackwardArgs& a, int threads) {
  const T *student = static_cast<const T*>(a.student), *teacher = static_cast<const T*>(a.teacher);
  const Slopes<T> all{static_cast<T*>(a.dstudent), static_cast<T*>(a.dteacher)};
  const HeadRow<C>* const rows = static_cast<const HeadRow<C>*>(a.rows);
  const C temperature = static_cast<C>(a.temperature);
  const bool has_kd = a.grad_kd, has_ce = a.grad_ce && a.labels, simd = simd_enabled();
  const C kd =
      has_kd ? kd_pull<kKd>(*static_cast<const C*>(a.grad_kd), static_cast<C>(a.kd_weight), temperature) : C(0);
  const C ce = has_ce ? mul(*static_cast<const C*>(a.grad_ce), static_cast<C>(a.ce_weight)) : C(0);
  parallel_for(a.samples, grain_of(a.classes), threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t i = b * a.classes;
      const ScalarTeam<T, C> x{student + i, teacher + i, a.classes};
      const HeadPull<C> pull{kd, a.easy[b] ? ce : C(0)};
      const Slopes<T> out{all.student ? all.student + i : nullptr, all.teacher ? all.teacher + i : nullptr};
      slopes<kKd>(x, has_ce ? a.labels[b] : -1, temperature, rows[b], pull, has_kd, has_ce, out, simd);
    }
  });
}

template <class T, class C, class A>
void with_form(const A& a, int threads) {
  switch (a.form) {
    case Kd::kl:
      return run<Kd::kl, T, C>(a, threads);
    case Kd::mse:
      return run<Kd::mse, T, C>(a, threads);
    case Kd::entropy:
      return run<Kd::entropy, T, C>(a, threads);
  }
}

template <class A>
void with_dtype(const A& a, int threads) {
  switch (a.dtype) {
    case DType::f32:
      return with_form<float, float>(a, threads);
    case DType::f16:
      return with_form<f16, float>(a, threads);
    case DType::bf16:
      return with_form<bf16, float>(a, threads);
    case DType::f64:
      return with_form<double, double>(a, threads);
  }
}

}  // namespace

void distill_head(const DistillHeadArgs& args, int threads) { with_dtype(args, threads); }

void distill_head_backward(const DistillHeadBackwardArgs& args, int threads) { with_dtype(args, threads); }

}  // namespace zsq
