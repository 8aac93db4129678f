// Registration of the CPU operators, and the small ones themselves. Schemas are defined in fusedkl/_library.py.
#include <Python.h>

#include <memory>
#include <tuple>

#include "tensors.h"

namespace fusedkl {

std::tuple<Tensor, Tensor> row_stats(const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                                     const std::vector<std::string>&, std::optional<double>, const std::optional<Tensor>&,
                                     const std::optional<Tensor>&, std::optional<int64_t>, std::optional<double>);
std::tuple<Tensor, Tensor> row_stats_backward(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                              const std::optional<Tensor>&, const Tensor&, const std::vector<std::string>&,
                                              std::optional<double>, const std::optional<Tensor>&, std::optional<int64_t>,
                                              std::optional<double>, bool, bool);
Tensor row_stats_backward_(const Tensor&, Tensor, const std::optional<Tensor>&, const std::optional<Tensor>&, const Tensor&,
                           const std::vector<std::string>&, std::optional<double>, const std::optional<Tensor>&,
                           std::optional<int64_t>, std::optional<double>, bool);
std::tuple<Tensor, Tensor, Tensor> row_stats_with_gradient(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                                           const std::vector<std::string>&, std::optional<double>,
                                                           const std::optional<Tensor>&, const std::optional<Tensor>&,
                                                           std::optional<int64_t>, std::optional<double>);
Tensor row_sums(const Tensor&, const Tensor&, const Tensor&, std::string, std::optional<double>, const std::optional<Tensor>&,
                const std::optional<Tensor>&, std::optional<int64_t>, std::optional<double>);
void scale_gradient_(Tensor, const Tensor&);
std::tuple<Tensor, Tensor> merge_states(const Tensor&, const std::vector<std::string>&, const std::optional<Tensor>&);

namespace {

constexpr int64_t kChunk = 2048;

// log_softmax over the last dimension, any pair of dtypes; arithmetic in fp32 (fp64 for fp64 logits)
Tensor log_softmax(const Tensor& logits, ScalarType dtype) {
  const Rows in = Rows::of(logits, "logits");
  const DType out_type = dtype == ScalarType::Float      ? DType::f32
                         : dtype == ScalarType::BFloat16 ? DType::bf16
                         : dtype == ScalarType::Half     ? DType::f16
                                                         : DType::f64;
  const Tensor result = new_result(logits, sizes_of(logits), out_type);
  const Rows out(result, "result", result.mutable_data_ptr());
  const KernelTable& k = kernels();
  const bool f64 = in.dtype == DType::f64 || out_type == DType::f64;
  torch::stable::parallel_for(0, in.count, grain_of(in.length), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> room(new float[kChunk]);
    const Segments seg(in.length);
    std::vector<RowState> parts(static_cast<size_t>(seg.count));
    for (int64_t r = begin; r < end && in.length > 0; r++) {
      if (f64) {
        const RowState s = single_f64({in.row(r), in.dtype}, in.length, 1);
        for (int64_t i = 0; i < in.length; i++)
          store_double(out.row(r), out_type, i, (load_double(in.row(r), in.dtype, i) - s.policy_max) - s.policy_log_sum);
        continue;
      }
      for (int64_t i = 0; i < seg.count; i++) {
        const int64_t from = i * seg.size;
        parts[static_cast<size_t>(i)] = k.single[static_cast<int>(in.dtype)](
            in.row(r, from), in.length - from < seg.size ? in.length - from : seg.size, 1, false);
      }
      const RowState s = merge(parts.data(), static_cast<int>(seg.count), 1);
      for (int64_t i = 0; i < in.length; i += kChunk) {
        const int64_t n = in.length - i < kChunk ? in.length - i : kChunk;
        float* const target = out_type == DType::f32 ? static_cast<float*>(out.row(r, i)) : room.get();
        k.widen[static_cast<int>(in.dtype)](in.row(r, i), target, n);
        k.log_softmax(target, n, s);
        if (out_type != DType::f32) k.narrow[static_cast<int>(out_type)](target, out.row(r, i), n);
      }
    }
  });
  return result;
}

// grad - softmax * sum(grad), softmax = exp(output)
Tensor log_softmax_backward(const Tensor& grad, const Tensor& output, ScalarType dtype) {
  const Rows g = Rows::of(grad, "grad"), o = Rows::of(output, "output");
  STD_TORCH_CHECK(g.count == o.count && g.length == o.length, "grad and output differ in shape");
  const DType out_type = dtype == ScalarType::Float      ? DType::f32
                         : dtype == ScalarType::BFloat16 ? DType::bf16
                         : dtype == ScalarType::Half     ? DType::f16
                                                         : DType::f64;
  const Tensor result = new_gradient(output, out_type);
  const Rows out(result, "result", result.mutable_data_ptr());
  const KernelTable& k = kernels();
  const bool f64 = g.dtype == DType::f64 || o.dtype == DType::f64 || out_type == DType::f64;
  torch::stable::parallel_for(0, g.count, grain_of(g.length), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> room(new float[2 * kChunk]);
    float *const gs = room.get(), *const os = room.get() + kChunk;
    for (int64_t r = begin; r < end; r++) {
      double total = 0;
      if (f64) {
        for (int64_t i = 0; i < g.length; i++) total += load_double(g.row(r), g.dtype, i);
        for (int64_t i = 0; i < g.length; i++)
          store_double(out.row(r), out_type, i,
                       load_double(g.row(r), g.dtype, i) - exp(load_double(o.row(r), o.dtype, i)) * total);
        continue;
      }
      for (int64_t i = 0; i < g.length; i += kChunk) {
        const int64_t n = g.length - i < kChunk ? g.length - i : kChunk;
        k.widen[static_cast<int>(g.dtype)](g.row(r, i), gs, n);
        total += k.sum(gs, n);
      }
      for (int64_t i = 0; i < g.length; i += kChunk) {
        const int64_t n = g.length - i < kChunk ? g.length - i : kChunk;
        k.widen[static_cast<int>(g.dtype)](g.row(r, i), gs, n);
        k.widen[static_cast<int>(o.dtype)](o.row(r, i), os, n);
        k.log_softmax_gradient(os, gs, n, total);
        k.narrow[static_cast<int>(out_type)](gs, out.row(r, i), n);
      }
    }
  });
  return result;
}

// sum of values * weight in index order, accumulated in double: the same bits for any number of threads
Tensor ordered_sum(const Tensor& values, const std::optional<Tensor>& weight) {
  const DType d = dtype_of(values, "values");
  STD_TORCH_CHECK(values.dim() == 1 && (!weight || (weight->dim() == 1 && weight->size(0) == values.size(0))),
                  "values and weight: 1-D, of one length");
  const DType dw = weight ? dtype_of(*weight, "weight") : d;
  const void* const v = values.const_data_ptr();
  const void* const w = weight ? weight->const_data_ptr() : nullptr;
  double total = 0;
  for (int64_t i = 0; i < values.size(0); i++) {
    const double a = load_double(v, d, i * values.stride(0));
    total += w ? a * load_double(w, dw, i * weight->stride(0)) : a;
  }
  const Tensor out = torch::stable::new_empty(values, {}, scalar_type_of(d));
  store_double(out.mutable_data_ptr(), d, 0, total);
  return out;
}

std::string cpu_isa() { return kernels().isa; }

}  // namespace
}  // namespace fusedkl

STABLE_TORCH_LIBRARY_IMPL(fusedkl, CPU, m) {
  m.impl("_row_stats", TORCH_BOX(&fusedkl::row_stats));
  m.impl("_row_stats_backward", TORCH_BOX(&fusedkl::row_stats_backward));
  m.impl("_row_stats_backward_", TORCH_BOX(&fusedkl::row_stats_backward_));
  m.impl("_row_stats_with_gradient", TORCH_BOX(&fusedkl::row_stats_with_gradient));
  m.impl("_row_sums", TORCH_BOX(&fusedkl::row_sums));
  m.impl("_scale_gradient_", TORCH_BOX(&fusedkl::scale_gradient_));
  m.impl("_merge_states", TORCH_BOX(&fusedkl::merge_states));
  m.impl("_log_softmax", TORCH_BOX(&fusedkl::log_softmax));
  m.impl("_log_softmax_backward", TORCH_BOX(&fusedkl::log_softmax_backward));
  m.impl("_ordered_sum", TORCH_BOX(&fusedkl::ordered_sum));
}

STABLE_TORCH_LIBRARY_IMPL(fusedkl, CompositeExplicitAutograd, m) { m.impl("_cpu_isa", TORCH_BOX(&fusedkl::cpu_isa)); }

// torch.ops.load_library needs no Python symbol; this one lets `import fusedkl._C` work too.
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
