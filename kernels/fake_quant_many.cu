// fake_quant and LSQ's gradient for many tensors in one launch: a block belongs to one tensor, and does for it what it
// would do were the tensor alone. Contract: zsq_ext/ops/reference/fake_quant_many.py; arithmetic: fake_quant.h.
#include <algorithm>

#include "elementwise.cuh"
#include "lsq.cuh"
#include "table.cuh"

namespace zsq {
namespace {

struct ForwardRecord {
  CudaFakeQuantArgs fq;
  int64_t block;  // its first
  Channels channels;
  bool aligned;
};

struct BackwardRecord {
  lsq::Args lsq;
  int64_t block;  // its first; in the second stage its first channel
};

// A kernel's parameters end at 4 KiB. All weights of a ResNet-18 are 21, of a ResNet-20 for CIFAR 22.
template <class Record>
struct Table {
  static constexpr int kSize = (4096 - 16) / sizeof(Record);
  Record records[kSize];
  int count;
  int64_t blocks;

  void add(Record record, int64_t more) {
    record.block = blocks;
    records[count++] = record;
    blocks += more;
  }
};

static_assert(sizeof(Table<ForwardRecord>) <= 4096 && sizeof(Table<BackwardRecord>) <= 4096, "arguments of a kernel");
static_assert(Table<BackwardRecord>::kSize >= 22, "the weights of a small network in one launch");

template <class T>
__global__ void __launch_bounds__(kThreads)
    fake_quant_many_forward_kernel(const __grid_constant__ Table<ForwardRecord> table) {
  const ForwardRecord& r = record_at(table.records, table.count, blockIdx.x);
  const int64_t i = ((blockIdx.x - r.block) * kThreads + threadIdx.x) * Pack<T>::kSize;
  if (i >= r.fq.n) return;
  switch (r.channels) {
    case Channels::kOne:
      return fake_quant_pack<T, Channels::kOne, false>(r.fq, i, r.aligned);
    case Channels::kEach:
      return fake_quant_pack<T, Channels::kEach, false>(r.fq, i, r.aligned);
    case Channels::kMixed:
      return fake_quant_pack<T, Channels::kMixed, false>(r.fq, i, r.aligned);
  }
}

template <class T, int kVec>
__device__ void lsq_block(const lsq::Args& a, int64_t block) {
  if (a.plan.columns) {
    lsq::columns<T, kVec>(a, block);
  } else if (a.fq.inner < kShortRow) {
    lsq::rows<T, kVec, kShortGroup>(a, block);
  } else {
    lsq::rows<T, kVec, kThreads>(a, block);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    fake_quant_many_backward_kernel(const __grid_constant__ Table<BackwardRecord> table) {
  const BackwardRecord& r = record_at(table.records, table.count, blockIdx.x);
  if (r.lsq.plan.wide) {
    lsq_block<T, Pack<T>::kSize>(r.lsq, blockIdx.x - r.block);
  } else {
    lsq_block<T, 1>(r.lsq, blockIdx.x - r.block);
  }
}

__global__ void __launch_bounds__(kThreads)
    fake_quant_many_finish_kernel(const __grid_constant__ Table<BackwardRecord> table) {
  const BackwardRecord& r = record_at(table.records, table.count, blockIdx.x);
  lsq::second_stage(r.lsq, blockIdx.x - r.block);
}

template <class Record>
void launch(void (*kernel)(Table<Record>), const Table<Record>& table, cudaStream_t stream) {
  if (table.blocks > 0) kernel<<<static_cast<unsigned>(table.blocks), kThreads, 0, stream>>>(table);
}

template <class T>
void forward(const CudaFakeQuantManyArgs& a, cudaStream_t stream) {
  constexpr int kSize = Pack<T>::kSize;
  for (size_t next = 0; next < a.tensors.size();) {
    Table<ForwardRecord> table{};
    for (; next < a.tensors.size() && table.count < table.kSize; ++next) {
      const CudaFakeQuantArgs& f = a.tensors[next].fq;
      if (f.n == 0) continue;
      const bool aligned = aligned_for<Pack<T>>(f.x, f.out, f.out);
      table.add({f, 0, meeting(f, kSize), aligned}, ceil_div(f.n, int64_t{kThreads} * kSize));
    }
    launch(fake_quant_many_forward_kernel<T>, table, stream);
  }
}

Plan plan_of(const CudaFakeQuantArgs& f) { return plan_of(f.n, f.channels, f.inner, f.dtype); }

template <class T>
void backward(const CudaFakeQuantManyArgs& a, cudaStream_t stream) {
  auto* partial = static_cast<char*>(a.workspace);
  for (size_t next = 0; next < a.tensors.size();) {
    Table<BackwardRecord> table{}, second{};
    for (; next < a.tensors.size() && table.count < table.kSize; ++next) {
      const CudaFakeQuantTensor& t = a.tensors[next];
      if (t.fq.n == 0) continue;
      lsq::Args args{t.fq, plan_of(t.fq), t.dscale, t.dzero_point, reinterpret_cast<lsq::Sums*>(partial), false};
      const int size = args.plan.wide ? Pack<T>::kSize : 1;
      args.aligned = args.plan.wide ? aligned_for<Pack<T>>(t.fq.x, t.fq.grad, t.fq.out)
                                    : aligned_for<Pack<T, 1>>(t.fq.x, t.fq.grad, t.fq.out);
      table.add({args, 0}, lsq::blocks_of(args, size));
      if (t.dscale && args.plan.parts > 1) {
        second.add({args, 0}, t.fq.channels);
        partial += lsq::partial_bytes(t.fq.channels, args.plan);
      }
    }
    launch(fake_quant_many_backward_kernel<T>, table, stream);
    launch(fake_quant_many_finish_kernel, second, stream);
  }
}

template <class T>
void run(const CudaFakeQuantManyArgs& a, cudaStream_t stream) {
  if (a.backward) {
    backward<T>(a, stream);
  } else {
    forward<T>(a, stream);
  }
}

}  // namespace

int64_t cuda_fake_quant_many_workspace(const CudaFakeQuantManyArgs& args) {
  int64_t bytes = 0;
  for (const CudaFakeQuantTensor& t : args.tensors) {
    if (t.dscale && t.fq.n > 0) bytes += lsq::partial_bytes(t.fq.channels, plan_of(t.fq));
  }
  return bytes;
}

cudaError_t cuda_fake_quant_many(const CudaFakeQuantManyArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::f32:
      run<float>(args, stream);
      break;
    case DType::f16:
      run<__half>(args, stream);
      break;
    case DType::bf16:
      run<__nv_bfloat16>(args, stream);
      break;
    case DType::f64:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace zsq
