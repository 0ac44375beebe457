// The Python module grpo_fast._C: addresses, sizes and strides as integers in, CUDA's error code out. It knows nothing
// of torch, so one build serves every version. grpo_fast/cuda.py calls it.

#include <pybind11/pybind11.h>

#include <string>
#include <tuple>
#include <utility>

#include "api.h"

namespace py = pybind11;
namespace gf = grpo_fast;

namespace {

using Address = std::uintptr_t;
using Tensor = std::pair<Address, int>;  // address, 0 for None, and DType

// ValueError with the argument, what came and what is wanted, before anything is launched.
template <typename T>
void want(bool right, const char* name, T got, const char* wanted) {
  if (!right) throw py::value_error(std::string(name) + ": got " + std::to_string(got) + ", want " + wanted);
}

gf::Values values(const Tensor& tensor) {
  want(tensor.second >= 0 && tensor.second <= static_cast<int>(gf::DType::kInt64), "dtype", tensor.second, "0 to 7");
  return {reinterpret_cast<const void*>(tensor.first), static_cast<gf::DType>(tensor.second)};
}

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Makes a device current, and the one before it again.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    moved_ = error_ == cudaSuccess && before_ != device;
    if (moved_) error_ = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool moved_ = false;
  cudaError_t error_;
};

// A failed call leaves its error behind for the next launch to find: take it away.
int code(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

cudaStream_t stream_of(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

using Words = std::pair<Address, std::int64_t>;  // address and stride

gf::Words words(const Words& part) {
  want(part.first % 16 == 0 && part.second % 8 == 0, "stride", part.second, "rows at multiples of 16 bytes");
  return {pointer<std::uint16_t>(part.first), part.second};
}

using Partials = std::tuple<Address, int, Address>;  // address, stride, and that of the number of lanes

gf::Partials partials_of(const Partials& partials) {
  return {pointer<float4>(std::get<0>(partials)), std::get<1>(partials), pointer<int>(std::get<2>(partials))};
}

using Strides = std::pair<std::int64_t, std::int64_t>;

bool is_half(gf::DType dtype) { return dtype == gf::DType::kBFloat16 || dtype == gf::DType::kFloat16; }

gf::Rows make_rows(Tensor logits, Strides strides, Tensor out, Strides out_strides, int count, int T, int V, Tensor ids,
                   bool has_softcap, float slope, float cap, float cap_in) {
  const auto dtype = values(logits).dtype, out_dtype = values(out).dtype, id_dtype = values(ids).dtype;
  const bool is_float32 = dtype == gf::DType::kFloat32;
  want(is_float32 || is_half(dtype), "logits' dtype", logits.second, "0 (float32), 1 (bfloat16) or 2 (float16)");
  want(out.first == 0 || out_dtype == dtype || (is_float32 && is_half(out_dtype)), "out's dtype", out.second,
       "that of the logits, or a half precision for float32 logits");
  want(id_dtype == gf::DType::kInt32 || id_dtype == gf::DType::kInt64, "ids' dtype", ids.second,
       "6 (int32) or 7 (int64)");
  want(count >= 0, "count", count, "0 or more rows");
  want(T >= (count > 0 ? 1 : 0), "T", T, "1 or more");
  want(V >= 2, "V", V, "2 or more");
  return {pointer<const void>(logits.first),
          dtype,
          pointer<void>(out.first),
          out_dtype,
          strides.first,
          strides.second,
          out_strides.first,
          out_strides.second,
          count,
          T,
          V,
          values(ids),
          nullptr,
          {has_softcap, slope, cap, cap_in}};
}

gf::Layout make_layout(int cluster, int consumers, int stages) {
  want(cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8 || cluster == 16, "cluster", cluster,
       "1, 2, 4, 8 or 16 blocks");
  want(consumers >= 1 && consumers <= gf::kMaxConsumers, "consumers", consumers, "1 to 18 warps");
  want(stages >= 1, "stages", stages, "1 or more");
  return {cluster, consumers, stages};
}

gf::Head make_head(Tensor hidden, std::int64_t hidden_stride, Tensor weight, std::int64_t weight_stride, Address bias,
                   int count, int V, int H, Address counted, Tensor ids, bool has_softcap, float slope, float cap,
                   float cap_in, int multiprocessors) {
  const char* const aligned = "rows at multiples of 16 bytes";
  want(is_half(values(hidden).dtype), "hidden's dtype", hidden.second, "1 (bfloat16) or 2 (float16)");
  want(weight.second == hidden.second, "weight's dtype", weight.second, "that of hidden");
  want(hidden.first % 16 == 0 && hidden_stride % 8 == 0, "hidden's stride", hidden_stride, aligned);
  want(weight.first % 16 == 0 && weight_stride % 8 == 0, "weight's stride", weight_stride, aligned);
  want(values(ids).dtype == gf::DType::kInt32 || values(ids).dtype == gf::DType::kInt64, "ids' dtype", ids.second,
       "6 (int32) or 7 (int64)");
  want(count >= 1, "count", count, "1 or more rows");
  want(V >= 2, "V", V, "2 or more");
  want(H >= 1, "H", H, "1 or more");
  want(multiprocessors >= 2, "multiprocessors", multiprocessors, "2 or more");
  return {values(hidden),
          hidden_stride,
          values(weight),
          weight_stride,
          pointer<const float>(bias),
          count,
          V,
          H,
          pointer<const std::int64_t>(counted),
          values(ids),
          {has_softcap, slope, cap, cap_in},
          multiprocessors};
}

// A batch with its options, and where what is found of it goes.
struct Loss {
  gf::Batch batch;
  gf::PlanInputs inputs;
  gf::Plan plan;
  gf::LossOptions options;
  gf::TokenInputs tokens;
  gf::RowResults results;

  bool entropy_bonus() const { return inputs.entropy_coef != 0.0f; }
};

Loss make_loss(int count, int T, int N, Tensor mask, Tensor ends, Tensor entropy_mask, Tensor advantages,
               bool per_token_advantages, Tensor rewards, int group_size, int scale_rewards, Tensor sampler_ratio,
               bool per_token_sampler_ratio, int reduction, float divisor, Tensor num_items, Tensor token_weights,
               float entropy_coef, Tensor entropy_items, Tensor old_logps, Tensor ref_logps, Tensor entropy_threshold,
               int term, int kl_estimator, bool has_dual_clip, bool bias_correction, float low, float high, float delta,
               float dual_clip, float beta, float tau_pos, float tau_neg, Address plan_values, Address kept,
               Address zero_std, Address d_entropy, Address logps, Address entropies, Address losses, Address kls,
               Address ratios, Address clips) {
  want(rewards.first == 0 || group_size >= 1, "group_size", group_size, "1 or more with rewards");
  const bool empty = N == 0;  // whose tensors have no address either
  want(empty || rewards.first != 0 || advantages.first != 0, "advantages", 0, "their address, or rewards");
  want(empty || kl_estimator == gf::kNoKL || ref_logps.first != 0, "ref_logps", 0, "their address with a KL term");
  float* by_token = pointer<float>(plan_values);  // (3, N)
  float* ratio = sampler_ratio.first == 0 ? nullptr : by_token + std::int64_t(2) * N;
  return {
      {count, T, N, values(mask), values(ends), values(entropy_mask)},
      {values(advantages), per_token_advantages, values(rewards), group_size, scale_rewards, values(sampler_ratio),
       per_token_sampler_ratio, reduction, divisor, values(num_items), values(token_weights), entropy_coef,
       values(entropy_items)},
      {by_token, by_token + N, ratio, pointer<std::uint8_t>(kept), pointer<float>(zero_std), pointer<float>(d_entropy)},
      {term, kl_estimator, has_dual_clip, bias_correction, low, high, delta, dual_clip, beta, tau_pos, tau_neg},
      {values(old_logps), values(ref_logps), values(entropy_mask), values(entropy_threshold)},
      {pointer<float>(logps), pointer<float>(entropies), pointer<float>(losses),
       kl_estimator == gf::kNoKL ? nullptr : pointer<float>(kls), pointer<float>(ratios), pointer<float>(clips)}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("architectures") = GRPO_FAST_ARCHITECTURES;
  m.attr("cuda_version") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  m.attr("PARTIAL") = gf::kPartial;
  m.attr("TILE_WORDS") = gf::kTileWords;
  m.attr("BAND_ROWS") = gf::kBandRows;
  m.attr("SPARSE_SAMPLE") = sizeof(gf::SparseSample) / sizeof(unsigned long long);
  m.def("error_string", [](int code) { return std::string(cudaGetErrorString(static_cast<cudaError_t>(code))); });

  py::class_<gf::Layout>(m, "Layout")
      .def(py::init(&make_layout), py::arg("cluster"), py::arg("consumers"), py::arg("stages"))
      .def_readonly("cluster", &gf::Layout::cluster)
      .def_readonly("consumers", &gf::Layout::consumers)
      .def_readonly("stages", &gf::Layout::stages)
      .def_property_readonly("chunk_bytes", [](const gf::Layout& self) { return gf::chunk_bytes(self); })
      .def_property_readonly("shared_bytes", [](const gf::Layout& self) { return gf::shared_bytes(self); });

  py::class_<gf::Rows>(m, "Rows").def(py::init(&make_rows), py::arg("logits"), py::arg("strides"), py::arg("out"),
                                      py::arg("out_strides"), py::arg("count"), py::arg("T"), py::arg("V"),
                                      py::arg("ids"), py::arg("has_softcap"), py::arg("slope"), py::arg("cap"),
                                      py::arg("cap_in"));

  py::class_<Loss>(m, "Loss").def(
      py::init(&make_loss), py::arg("count"), py::arg("T"), py::arg("N"), py::arg("mask"), py::arg("ends"),
      py::arg("entropy_mask"), py::arg("advantages"), py::arg("per_token_advantages"), py::arg("rewards"),
      py::arg("group_size"), py::arg("scale_rewards"), py::arg("sampler_ratio"), py::arg("per_token_sampler_ratio"),
      py::arg("reduction"), py::arg("divisor"), py::arg("num_items"), py::arg("token_weights"), py::arg("entropy_coef"),
      py::arg("entropy_items"), py::arg("old_logps"), py::arg("ref_logps"), py::arg("entropy_threshold"),
      py::arg("term"), py::arg("kl_estimator"), py::arg("has_dual_clip"), py::arg("bias_correction"), py::arg("low"),
      py::arg("high"), py::arg("delta"), py::arg("dual_clip"), py::arg("beta"), py::arg("tau_pos"), py::arg("tau_neg"),
      py::arg("plan_values"), py::arg("kept"), py::arg("zero_std"), py::arg("d_entropy"), py::arg("logps"),
      py::arg("entropies"), py::arg("losses"), py::arg("kls"), py::arg("ratios"), py::arg("clips"));

  m.def(
      "grpo_loss_rows",
      [](int device, Address stream, gf::Rows rows, const gf::Layout& layout, const Loss& loss) -> int {
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        rows.kept = loss.plan.kept;
        const cudaError_t error = gf::plan(loss.batch, loss.inputs, loss.plan, stream_of(stream));
        if (error != cudaSuccess || rows.count == 0) return code(error);
        return code(gf::grpo_loss_rows(rows, layout, loss.options, loss.plan, loss.tokens, loss.entropy_bonus(),
                                       loss.results, stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("rows"), py::arg("layout"), py::arg("loss"));

  m.def(
      "sum_rows",
      [](int device, Address stream, int count, int T, int N, Tensor mask, Tensor ends, Tensor entropy_mask,
         Address entropies, Address losses, Address kls, Address ratios, Address clips, Address zero_std,
         float entropy_coef, Address partials, Address results) -> int {
        want(count >= 0, "count", count, "0 or more sequences");
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        const gf::Batch batch = {count, T, N, values(mask), values(ends), values(entropy_mask)};
        const gf::RowResults rows = {nullptr,
                                     pointer<float>(entropies),
                                     pointer<float>(losses),
                                     pointer<float>(kls),
                                     pointer<float>(ratios),
                                     pointer<float>(clips)};
        return code(gf::sum_rows(batch, rows, pointer<const float>(zero_std), entropy_coef, pointer<float>(partials),
                                 pointer<float>(results), stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("count"), py::arg("T"), py::arg("N"), py::arg("mask"),
      py::arg("ends"), py::arg("entropy_mask"), py::arg("entropies"), py::arg("losses"), py::arg("kls"),
      py::arg("ratios"), py::arg("clips"), py::arg("zero_std"), py::arg("entropy_coef"), py::arg("partials"),
      py::arg("results"));

  m.def(
      "log_probs",
      [](int device, Address stream, gf::Rows rows, const gf::Layout& layout, Address kept, Address logps,
         Address entropies, Address shifts, Address totals) -> int {
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        rows.kept = pointer<const std::uint8_t>(kept);
        return code(gf::log_probs_rows(
            rows, layout,
            {pointer<float>(logps), pointer<float>(entropies), pointer<float>(shifts), pointer<float>(totals)},
            stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("rows"), py::arg("layout"), py::arg("kept"), py::arg("logps"),
      py::arg("entropies"), py::arg("shifts"), py::arg("totals"));

  py::class_<gf::Head>(m, "Head").def(
      py::init(&make_head), py::arg("hidden"), py::arg("hidden_stride"), py::arg("weight"), py::arg("weight_stride"),
      py::arg("bias"), py::arg("count"), py::arg("V"), py::arg("H"), py::arg("counted"), py::arg("ids"),
      py::arg("has_softcap"), py::arg("slope"), py::arg("cap"), py::arg("cap_in"), py::arg("multiprocessors"));

  py::class_<gf::Exponentials>(m, "Exponentials")
      .def(py::init([](Words first, Words rest, int split, Address bases) -> gf::Exponentials {
             want(split % gf::kTileWords == 0, "split", split, "a multiple of 256 words");
             return {words(first), words(rest), split, pointer<float>(bases)};
           }),
           py::arg("first"), py::arg("rest"), py::arg("split"), py::arg("bases"));

  py::class_<gf::SparseLimits>(m, "SparseLimits")
      .def(py::init([](Address totals, std::pair<std::uint64_t, std::uint64_t> room, int most_dense) {
             want(most_dense >= 0, "most_dense", most_dense, "0 or more rows");
             return gf::SparseLimits{pointer<gf::SparseTotals>(totals), room.first, room.second,
                                     static_cast<unsigned long long>(most_dense)};
           }),
           py::arg("totals"), py::arg("room"), py::arg("most_dense"));

  py::class_<gf::Conversion>(m, "Conversion")
      .def(py::init([](const gf::Head& head, const gf::Exponentials& exponentials, Address slopes,
                       bool tilted) -> gf::Conversion {
             want(head.hidden.dtype == gf::DType::kBFloat16, "hidden's dtype", static_cast<int>(head.hidden.dtype),
                  "1 (bfloat16)");
             return {head, exponentials, pointer<const float4>(slopes), tilted};
           }),
           py::arg("head"), py::arg("exponentials"), py::arg("slopes"), py::arg("tilted"));

  m.def("linear_lanes", &gf::linear_lanes, py::arg("count"), py::arg("multiprocessors"));
  m.def("linear_lanes_at_most", &gf::linear_lanes_at_most, py::arg("multiprocessors"));

  m.def(
      "linear_product",
      [](int device, Address stream, const gf::Head& head, const gf::Exponentials& exponentials,
         const Partials& partials, const gf::Conversion* meanwhile, Address next_slice) -> int {
        const bool keeps = exponentials.first.values != nullptr;
        if (meanwhile != nullptr) {
          want(keeps, "meanwhile", meanwhile->head.count, "no rows where the product leaves no exponentials");
        }
        want(!keeps || next_slice != 0, "next_slice", next_slice, "an address");
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        return code(gf::linear_product(head, exponentials, partials_of(partials), meanwhile, pointer<int>(next_slice),
                                       stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("head"), py::arg("exponentials"), py::arg("partials"),
      py::arg("meanwhile"), py::arg("next_slice"));

  m.def(
      "linear_log_probs",
      [](int device, Address stream, const gf::Head& head, const Partials& partials, Address logps, Address entropies,
         Address shifts, Address totals) -> int {
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        return code(gf::linear_log_probs(
            head, partials_of(partials),
            {pointer<float>(logps), pointer<float>(entropies), pointer<float>(shifts), pointer<float>(totals)},
            stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("head"), py::arg("partials"), py::arg("logps"),
      py::arg("entropies"), py::arg("shifts"), py::arg("totals"));

  m.def(
      "linear_loss",
      [](int device, Address stream, const gf::Head& head, const Partials& partials, const Loss& loss,
         Address slopes) -> int {
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        const cudaError_t error = gf::plan(loss.batch, loss.inputs, loss.plan, stream_of(stream));
        if (error != cudaSuccess) return code(error);
        return code(gf::linear_loss(head, partials_of(partials), loss.options, loss.plan, loss.tokens, loss.results,
                                    pointer<float4>(slopes), stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("head"), py::arg("partials"), py::arg("loss"), py::arg("slopes"));

  m.def(
      "linear_slopes",
      [](int device, Address stream, const gf::Head& head, Address kept, Address logps, Address entropies,
         Address shifts, Address totals, Address d_logps, Address d_entropies, Address slopes) -> int {
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        return code(gf::linear_slopes(
            head, {pointer<float>(logps), pointer<float>(entropies), pointer<float>(shifts), pointer<float>(totals)},
            pointer<const std::uint8_t>(kept), pointer<const float>(d_logps), pointer<const float>(d_entropies),
            pointer<float4>(slopes), stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("head"), py::arg("kept"), py::arg("logps"), py::arg("entropies"),
      py::arg("shifts"), py::arg("totals"), py::arg("d_logps"), py::arg("d_entropies"), py::arg("slopes"));

  m.def(
      "linear_gradient_by_product",
      [](int device, Address stream, const gf::Head& head, const gf::Exponentials& place, Address slopes,
         bool tilted) -> int {
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        return code(
            gf::linear_gradient_by_product(head, place, pointer<const float4>(slopes), tilted, stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("head"), py::arg("place"), py::arg("slopes"), py::arg("tilted"));

  m.def(
      "linear_gradient",
      [](int device, Address stream, const gf::Conversion& conversion, Address which, int count) -> int {
        want(count >= 1 && count <= conversion.head.count, "count", count,
             "1 or more rows, and no more than there are");
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        return code(gf::linear_gradient(conversion, pointer<const std::int64_t>(which), count, stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("conversion"), py::arg("which"), py::arg("count"));

  m.def(
      "sparse_rows",
      [](int device, Address stream, const gf::Head& head, const gf::Exponentials& exponentials, Address slopes,
         bool tilted, Address usual, float tolerance, Address keys, Address values, Address starts, Address ends,
         const gf::SparseLimits& limits, int first_row, std::pair<int, int> most, Address sample, int sampled) -> int {
        want(sampled >= 1 && sampled <= head.count, "sampled", sampled, "1 or more rows, and no more than there are");
        want(head.V <= gf::kSparseWords, "V", head.V, "262144 or less");
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        return code(gf::sparse_rows(head, exponentials, pointer<const float4>(slopes), tilted,
                                    pointer<const float>(usual), tolerance,
                                    {pointer<std::int64_t>(keys), pointer<float>(values), pointer<std::int64_t>(starts),
                                     pointer<std::int64_t>(ends), limits, first_row, most.first, most.second,
                                     pointer<gf::SparseSample>(sample), sampled},
                                    stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("head"), py::arg("exponentials"), py::arg("slopes"),
      py::arg("tilted"), py::arg("usual"), py::arg("tolerance"), py::arg("keys"), py::arg("values"), py::arg("starts"),
      py::arg("ends"), py::arg("limits"), py::arg("first_row"), py::arg("most"), py::arg("sample"), py::arg("sampled"));

  m.def(
      "sum_of_rows",
      [](int device, Address stream, Address starts, Address ends, Address index, Address weights, Tensor matrix,
         std::int64_t stride, int rows, int width, Address base, Tensor out, const gf::SparseLimits& limits) -> int {
        want(values(matrix).dtype == gf::DType::kBFloat16, "matrix's dtype", matrix.second, "1 (bfloat16)");
        want(matrix.first % 16 == 0 && stride % 8 == 0, "matrix's stride", stride, "rows at multiples of 16 bytes");
        want(width >= 8 && width % 8 == 0, "width", width, "a multiple of 8");
        want(values(out).dtype == gf::DType::kFloat32 || values(out).dtype == gf::DType::kBFloat16, "out's dtype",
             out.second, "0 (float32) or 1 (bfloat16)");
        want(rows >= 1, "rows", rows, "1 or more");
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        return code(gf::sum_of_rows({pointer<const std::int64_t>(starts), pointer<const std::int64_t>(ends),
                                     pointer<const std::int32_t>(index), pointer<const float>(weights), limits},
                                    values(matrix), stride, rows, width, pointer<const float>(base),
                                    pointer<void>(out.first), values(out).dtype, stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("starts"), py::arg("ends"), py::arg("index"), py::arg("weights"),
      py::arg("matrix"), py::arg("stride"), py::arg("rows"), py::arg("width"), py::arg("base"), py::arg("out"),
      py::arg("limits"));

  m.def(
      "log_probs_gradient",
      [](int device, Address stream, gf::Rows rows, Address kept, Address logps, Address entropies, Address shifts,
         Address totals, Address d_logps, Address d_entropies) -> int {
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        rows.kept = pointer<const std::uint8_t>(kept);
        return code(gf::log_probs_gradient(
            rows, {pointer<float>(logps), pointer<float>(entropies), pointer<float>(shifts), pointer<float>(totals)},
            pointer<const float>(d_logps), pointer<const float>(d_entropies), stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("rows"), py::arg("kept"), py::arg("logps"), py::arg("entropies"),
      py::arg("shifts"), py::arg("totals"), py::arg("d_logps"), py::arg("d_entropies"));

  m.def(
      "scale_gradient",
      [](int device, Address stream, Tensor gradient, Strides strides, int count, int T, int V, Address factor) -> int {
        const OnDevice on(device);
        if (on.error() != cudaSuccess) return code(on.error());
        return code(gf::scale_gradient(pointer<void>(gradient.first), values(gradient).dtype, strides.first,
                                       strides.second, count, T, V, pointer<const float>(factor), stream_of(stream)));
      },
      py::arg("device"), py::arg("stream"), py::arg("gradient"), py::arg("strides"), py::arg("count"), py::arg("T"),
      py::arg("V"), py::arg("factor"));
}
