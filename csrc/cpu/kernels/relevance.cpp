// Relevance of patch tokens to classes, in one pass over the tokens.
//
// A worker takes a few tokens of one group at a time: it normalises them into its own cache, and
// projects them, multiplies them by the classes and takes their norms from there, so that the
// features of all tokens never exist together.
#include "../parallel.h"
#include "packing.h"
#include "tir/relevance.h"
#include "tir/rules.h"

namespace tir::cpu::TIR_ARCH {
namespace {

// Tokens that share one passage of the projection through the cache: a multiple of every
// max_tile_rows.
constexpr int64_t chunk_tokens = 48;

// Below this many multiply-adds the work is shorter than waking threads.
constexpr double min_parallel_work = 1e6;

// A sum over the whole vectors of `count` values, of which add(sum, i) adds the one at i, in chains
// that need not wait for each other.
template <class Add>
TIR_INLINE Vec sum_in_chains(int64_t count, Add add) {
  constexpr int chains = 4;
  Vec sums[chains] = {};
  int64_t i = 0;
  for (; i + chains * lanes <= count; i += chains * lanes) {
    TIR_UNROLL
    for (int c = 0; c < chains; ++c) sums[c] = add(sums[c], i + c * lanes);
  }
  for (; i + lanes <= count; i += lanes) sums[0] = add(sums[0], i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

float norm_of(const float* values, int64_t count) {
  Vec squares = sum_in_chains(count, [&](Vec sum, int64_t i) {
    return multiply_add(load(values + i), load(values + i), sum);
  });
  int64_t rest = count % lanes;
  Vec last = load_first(values + count - rest, rest);
  return __builtin_sqrtf(sum_of(multiply_add(last, last, squares)));
}

// The largest magnitude; infinite or NaN where a value is.
float largest_magnitude(const float* values, int64_t count) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    float magnitude = __builtin_fabsf(values[i]);
    if (magnitude != magnitude) return magnitude;
    if (magnitude > largest) largest = magnitude;
  }
  return largest;
}

// Scales values, of which `largest` is the largest magnitude, to where the sum of their squares
// fits float32 with room to spare: by a power of two, which is returned and rounds nothing.
float rescale(float* values, int64_t count, float largest) {
  constexpr int wanted_exponent = 40, largest_exponent = 120;
  uint32_t bits;
  memcpy(&bits, &largest, sizeof bits);
  int64_t exponent = wanted_exponent - (static_cast<int64_t>(bits >> 23) - 127);
  uint32_t factor_bits = static_cast<uint32_t>(smaller_of(exponent, largest_exponent) + 127) << 23;
  float factor = load_bits<float>(&factor_bits);
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
  return factor;
}

// Tokens of which more than this is the largest magnitude are scaled before they are projected.
constexpr float huge_token = 1.125899906842624e15f;  // 2^50

// |values| + cosine_eps: what the cosine divides by, for values multiplied by `factor`. Values
// whose squares leave float32's range are scaled in place, and the result with them.
float cosine_divisor(float* values, int64_t count, float factor) {
  constexpr float smallest = 8.8817841970012523e-16f;  // 2^-50
  constexpr float largest = 1.125899906842624e15f;      // 2^50
  float norm = norm_of(values, count);
  if (!(norm > smallest && norm < largest)) {
    float magnitude = largest_magnitude(values, count);
    if (magnitude > 0 && magnitude < __builtin_inff()) {
      factor *= rescale(values, count, magnitude);
      norm = norm_of(values, count);
    }
  }
  return norm + cosine_eps * factor;
}

const void* element_of(const Array& array, int64_t i) {
  return static_cast<const char*>(array.data) + i * bytes_of(array.type);
}

// A vector of the model's width in float32, or null for none.
class NormVector {
 public:
  NormVector(const Array& array, int64_t width)
      : exists_(array.data != nullptr), values_(exists_ ? round_up(width, lanes) : 0) {
    if (exists_) read_row(values_, array.data, array.type, width);
  }
  const float* values() const { return exists_ ? static_cast<float*>(values_) : nullptr; }

 private:
  bool exists_;
  Buffer<float> values_;
};

template <class Math>
struct Job {
  const Relevance& problem;
  const float *norm_weight, *norm_bias;
  typename Math::Unit* projection;  // packed: D values, E columns
  float* classes;                   // packed per group: E values, C columns
  float* class_divisors;            // [G, C]
  int64_t class_panels;             // units of one group of `classes`
  int64_t chunks_per_group;
};

template <class Math>
int64_t panel_units(const Relevance& problem) {
  return row_units<Math>(problem.model_dim) * panel_width;
}

// The projection is packed in items of some rows each, or of a panel of columns each, whichever lie
// side by side in memory.
constexpr int64_t rows_per_item = 32;

int64_t num_projection_items(const Relevance& problem) {
  return problem.proj_column_stride == 1 ? divide_up(problem.model_dim, rows_per_item)
                                         : divide_up(problem.joint_dim, panel_width);
}

template <class Math>
void pack_projection(void* data, ItemQueue& items) {
  const auto& job = *static_cast<const Job<Math>*>(data);
  const Relevance& problem = job.problem;
  auto* values = static_cast<const char*>(problem.proj.data);
  int64_t value_bytes = bytes_of(problem.proj.type);
  int64_t row_bytes = problem.proj_row_stride * value_bytes;
  int64_t column_bytes = problem.proj_column_stride * value_bytes;
  bool by_rows = problem.proj_column_stride == 1;
  Buffer<typename Math::Unit> workspace(by_rows ? 0 : lanes * row_units<Math>(problem.model_dim));
  for (int64_t item = items.take(); item >= 0; item = items.take()) {
    if (by_rows) {
      int64_t first = item * rows_per_item;
      int64_t count = smaller_of(rows_per_item, problem.model_dim - first);
      auto row_at = [&](int64_t i) -> const void* { return values + (first + i) * row_bytes; };
      pack_rows<Math>(job.projection + first / Math::values_per_unit * panel_width,
                      panel_units<Math>(problem), row_at, problem.proj.type, count,
                      problem.joint_dim);
    } else {
      int64_t first = item * panel_width;
      int64_t count = smaller_of(panel_width, problem.joint_dim - first);
      auto column_at = [&](int64_t i) -> const void* {
        return values + (first + i) * column_bytes;
      };
      pack_columns<Math>(job.projection + item * panel_units<Math>(problem), column_at,
                         problem.proj.type, count, problem.model_dim, workspace);
    }
  }
}

template <class Math>
void pack_classes(const Job<Math>& job) {
  const Relevance& problem = job.problem;
  int64_t joint_dim = problem.joint_dim;
  Buffer<float> workspace(lanes * row_units<Float32Math>(joint_dim));
  Buffer<float> classes(round_up(problem.num_classes * joint_dim, lanes));
  auto row_at = [&](int64_t i) { return classes + i * joint_dim; };
  for (int64_t g = 0; g < problem.num_groups; ++g) {
    int64_t first = g * problem.num_classes;
    read_row(classes, element_of(problem.class_embeddings, first * joint_dim),
             problem.class_embeddings.type, problem.num_classes * joint_dim);
    for (int64_t c = 0; c < problem.num_classes; ++c) {
      job.class_divisors[first + c] = cosine_divisor(row_at(c), joint_dim, 1.0f);
    }
    pack_columns<Float32Math>(job.classes + g * job.class_panels, row_at, Type::float32,
                              problem.num_classes, joint_dim, workspace);
  }
}

template <class Math>
class RelevanceWorker {
  using Unit = typename Math::Unit;

 public:
  explicit RelevanceWorker(const Job<Math>& job)
      : job_(job),
        problem_(job.problem),
        token_stride_(round_up(problem_.model_dim, 2 * lanes)),
        feature_stride_(problem_.proj.data ? round_up(problem_.joint_dim, lanes) : token_stride_),
        dot_stride_(round_up(problem_.num_classes, lanes)),
        tokens_(Math::values_per_unit == 1 ? 0 : token_stride_),
        left_rows_(chunk_tokens * row_stride()),
        features_(problem_.proj.data ? chunk_tokens * feature_stride_ : 0),
        dots_(chunk_tokens * dot_stride_) {}

  // The patch tokens [first, first + count) of a group, counted through its images.
  void run(int64_t group, int64_t first, int64_t count) {
    int64_t num_patches = problem_.length - problem_.num_prefix_tokens;
    int64_t first_image = group * (problem_.batch / problem_.num_groups);
    for (int64_t i = 0; i < count; ++i) {
      int64_t image = first_image + (first + i) / num_patches;
      int64_t token = problem_.num_prefix_tokens + (first + i) % num_patches;
      load_token(i, problem_.tokens.row(image, 0, token, problem_.token_type));
    }
    // Rows are multiplied in pairs.
    if (count % 2 != 0) memset(left_rows_ + count * row_stride(), 0, row_stride() * sizeof(Unit));

    float* features;
    if (problem_.proj.data != nullptr) {
      multiply_in_parts<Math>(count, problem_.joint_dim, steps_of<Math>(problem_.model_dim),
                              {left_rows_, row_stride(), 1},
                              {job_.projection, panel_units<Math>(problem_)}, features_,
                              feature_stride_);
      features = features_;
    } else if constexpr (Math::values_per_unit == 1) {
      features = left_rows_;
    }
    float divisors[chunk_tokens];
    for (int64_t i = 0; i < count; ++i) {
      divisors[i] = cosine_divisor(features + i * feature_stride_, problem_.joint_dim,
                                   token_factors_[i]);
    }
    int64_t class_panel_stride = round_up(problem_.joint_dim, lanes) * panel_width;
    multiply_in_parts<Float32Math>(count, problem_.num_classes, problem_.joint_dim,
                                   {features, feature_stride_, 1},
                                   {job_.classes + group * job_.class_panels, class_panel_stride},
                                   dots_, dot_stride_);
    const float* class_divisors = job_.class_divisors + group * problem_.num_classes;
    for (int64_t i = 0; i < count; ++i) {
      int64_t image = first_image + (first + i) / num_patches;
      int64_t patch = (first + i) % num_patches;
      float* relevance = problem_.relevance + image * problem_.num_classes * num_patches + patch;
      for (int64_t c = 0; c < problem_.num_classes; ++c) {
        relevance[c * num_patches] =
            dots_[i * dot_stride_ + c] / divisors[i] / class_divisors[c];
      }
    }
  }

 private:
  int64_t row_stride() const { return token_stride_ / Math::values_per_unit; }

  void load_token(int64_t i, const void* source) {
    Unit* target = left_rows_ + i * row_stride();
    float* values;
    if constexpr (Math::values_per_unit == 1) {
      values = target;
    } else {
      values = tokens_;
    }
    int64_t model_dim = problem_.model_dim;
    read_row(values, source, problem_.token_type, model_dim);
    token_factors_[i] = 1.0f;
    if (problem_.has_norm) {
      normalise(values, target);
    } else {
      if (problem_.proj.data != nullptr) {
        float largest = largest_magnitude(values, model_dim);
        if (largest > huge_token && largest < __builtin_inff()) {
          token_factors_[i] = rescale(values, model_dim, largest);
        }
      }
      if constexpr (Math::values_per_unit == 2) {
        for (int64_t k = 0; k < model_dim; k += lanes) put(target, k, load(values + k));
      }
    }
    for (int64_t k = round_up(model_dim, lanes); k < token_stride_; k += lanes) {
      put(target, k, zero());
    }
  }

  // A vector of values as units.
  static TIR_INLINE void put(Unit* target, int64_t k, Vec values) {
    if constexpr (Math::values_per_unit == 2) {
      store_bits(reinterpret_cast<uint16_t*>(target) + k, to_bfloat16(values));
    } else {
      store(target + k, values);
    }
  }

  struct Moments {
    Vec mean;  // in every lane
    float variance;
  };

  // The variance is taken around the mean: tokens of a deep block may lie far from zero, where the
  // mean of the squares would lose it.
  Moments moments_of(const float* values) const {
    int64_t model_dim = problem_.model_dim;
    float inverse_model_dim = 1.0f / static_cast<float>(model_dim);
    // Zeros stand behind the last value.
    Vec sum = sum_in_chains(round_up(model_dim, lanes),
                            [&](Vec sum, int64_t k) { return sum + load(values + k); });
    Vec mean = broadcast(sum_of(sum) * inverse_model_dim);
    Vec squares = sum_in_chains(model_dim, [&](Vec sum, int64_t k) {
      Vec centered = load(values + k) - mean;
      return multiply_add(centered, centered, sum);
    });
    float rest = 0;
    for (int64_t k = model_dim / lanes * lanes; k < model_dim; ++k) {
      rest += (values[k] - mean[0]) * (values[k] - mean[0]);
    }
    return {mean, (sum_of(squares) + rest) * inverse_model_dim};
  }

  // LayerNorm, into units.
  void normalise(float* values, Unit* target) const {
    int64_t model_dim = problem_.model_dim;
    Moments moments = moments_of(values);
    if (!(moments.variance < __builtin_inff())) {
      float largest = largest_magnitude(values, model_dim);
      if (largest < __builtin_inff()) {  // LayerNorm forgets the scale; beside it, eps is nothing
        rescale(values, model_dim, largest);
        moments = moments_of(values);
      }
    }
    Vec mean = moments.mean;
    Vec factor = broadcast(1.0f / __builtin_sqrtf(moments.variance + problem_.norm_eps));
    const float *weight = job_.norm_weight, *bias = job_.norm_bias;
    auto normalised = [&](int64_t k, auto load_at) {
      Vec value = (load(values + k) - mean) * factor;
      if (weight != nullptr) value = value * load_at(weight + k);
      return bias == nullptr ? value : value + load_at(bias + k);
    };
    int64_t k = 0;
    for (; k + lanes <= model_dim; k += lanes) {
      put(target, k, normalised(k, [](const float* source) { return load(source); }));
    }
    if (k == model_dim) return;
    auto load_last = [&](const float* source) { return load_first(source, model_dim - k); };
    float last[lanes];
    store(last, normalised(k, load_last));
    put(target, k, load_last(last));
  }

  const Job<Math>& job_;
  const Relevance& problem_;
  int64_t token_stride_, feature_stride_, dot_stride_;
  Buffer<float> tokens_;    // one token, where the left operand is not float32
  typename Math::State state_;
  Buffer<Unit> left_rows_;  // normalised tokens
  Buffer<float> features_;
  Buffer<float> dots_;
  float token_factors_[chunk_tokens];  // what each token was multiplied by
};

template <class Math>
void work(void* data, ItemQueue& items) {
  const auto& job = *static_cast<const Job<Math>*>(data);
  const Relevance& problem = job.problem;
  int64_t tokens_per_group = problem.batch / problem.num_groups *
                             (problem.length - problem.num_prefix_tokens);
  RelevanceWorker<Math> worker(job);
  for (int64_t item = items.take(); item >= 0; item = items.take()) {
    int64_t first = item % job.chunks_per_group * chunk_tokens;
    worker.run(item / job.chunks_per_group, first,
               smaller_of(chunk_tokens, tokens_per_group - first));
  }
}

template <class Math>
void run(const Relevance& problem, int threads) {
  int64_t class_panels =
      packed_units(round_up(problem.joint_dim, lanes), problem.num_classes);
  int64_t tokens_per_group = problem.batch / problem.num_groups *
                             (problem.length - problem.num_prefix_tokens);
  Buffer<typename Math::Unit> projection(
      problem.proj.data ? packed_units(row_units<Math>(problem.model_dim), problem.joint_dim) : 0);
  Buffer<float> classes(problem.num_groups * class_panels);
  Buffer<float> class_divisors(problem.num_groups * problem.num_classes);
  NormVector norm_weight(problem.norm_weight, problem.model_dim);
  NormVector norm_bias(problem.norm_bias, problem.model_dim);
  Job<Math> job{problem,        norm_weight.values(),
                norm_bias.values(), projection,
                classes,        class_divisors,
                class_panels,   divide_up(tokens_per_group, chunk_tokens)};
  double columns = problem.proj.data ? problem.joint_dim : problem.num_classes;
  double work_per_token = columns * problem.model_dim;
  if (work_per_token * tokens_per_group * problem.num_groups < min_parallel_work) threads = 1;
  if (problem.proj.data != nullptr) {
    run_workers(threads, num_projection_items(problem), pack_projection<Math>, &job);
  }
  pack_classes(job);
  run_workers(threads, problem.num_groups * job.chunks_per_group, work<Math>, &job);
}

}  // namespace

void relevance(const Relevance& problem, int threads) {
  // Without a projection there is nothing to gain from products of bfloat16.
  with_math(problem.proj.data == nullptr ? Type::float32 : problem.proj.type,
            [&](auto math) { run<decltype(math)>(problem, threads); });
}

}  // namespace tir::cpu::TIR_ARCH
