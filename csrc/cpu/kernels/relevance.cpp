// Relevance of patch tokens to classes, in one pass over the tokens.
//
// A worker takes a few tokens of one group at a time: it normalises them into its own cache, and
// projects them, multiplies them by the classes and takes their norms from there, so that the
// features of all tokens never exist together.
#include "../parallel.h"
#include "norms.h"
#include "packing.h"
#include "tir/relevance.h"

namespace tir::cpu::TIR_ARCH {
namespace {

// Tokens that share one passage of the projection through the cache: a multiple of every
// max_tile_rows.
constexpr int64_t chunk_tokens = 48;

// Of at most so many classes, products row by row take less time than those of matrices, whose
// columns fill vectors.
constexpr int64_t max_few_classes = 8;

// Below this many multiply-adds the work is shorter than waking threads.
constexpr double min_parallel_work = 1e6;

// Tokens of which more than this is the largest magnitude are scaled before they are projected.
constexpr float huge_token = 1.125899906842624e15f;  // 2^50

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
  float* classes;         // per group: packed, E values, C columns; of few, rows of whole vectors
  float* class_divisors;  // [G, C]
  int64_t class_stride;   // of rows; steps of panels
  int64_t class_units;    // of one group of `classes`
  bool has_few_classes;
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
void read_classes(const Job<Math>& job) {
  const Relevance& problem = job.problem;
  int64_t joint_dim = problem.joint_dim, stride = job.class_stride;
  bool packs = !job.has_few_classes;
  Buffer<float> workspace(packs ? lanes * row_units<Float32Math>(joint_dim) : 0);
  Buffer<float> copies(packs ? problem.num_classes * stride : 0);
  for (int64_t g = 0; g < problem.num_groups; ++g) {
    float* own = job.classes + g * job.class_units;
    auto row_at = [&](int64_t c) { return (packs ? copies : own) + c * stride; };
    for (int64_t c = 0; c < problem.num_classes; ++c) {
      int64_t number = g * problem.num_classes + c;
      read_row(row_at(c), element_of(problem.class_embeddings, number * joint_dim),
               problem.class_embeddings.type, joint_dim);
      job.class_divisors[number] = cosine_divisor(row_at(c), joint_dim, 1.0f);
    }
    if (packs) {
      pack_columns<Float32Math>(own, row_at, Type::float32, problem.num_classes, joint_dim,
                                workspace);
    }
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
    multiply_by_classes(features, count, job_.classes + group * job_.class_units);
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

  // Features of tokens, in pairs, with the classes of a group, into `dots_`.
  void multiply_by_classes(const float* features, int64_t count, const float* classes) {
    int64_t num_classes = problem_.num_classes, width = problem_.joint_dim;
    int64_t class_stride = job_.class_stride;
    if (!job_.has_few_classes) {
      multiply_in_parts<Float32Math>(count, num_classes, width, {features, feature_stride_, 1},
                                     {classes, class_stride * panel_width}, dots_, dot_stride_);
      return;
    }
    for (int64_t i = 0; i < count; i += 2) {
      int64_t c = 0;
      auto multiply = [&](auto classes_at_once) {
        const float* rows[classes_at_once];
        for (int64_t r = 0; r < classes_at_once; ++r) rows[r] = classes + (c + r) * class_stride;
        multiply_rows<Float32Row, 2>(rows, width, features + i * feature_stride_, feature_stride_,
                                     dots_ + i * dot_stride_ + c, dot_stride_);
        c += classes_at_once;
      };
      while (c + 4 <= num_classes) multiply(std::integral_constant<int, 4>());
      if (c + 2 <= num_classes) multiply(std::integral_constant<int, 2>());
      if (c < num_classes) multiply(std::integral_constant<int, 1>());
    }
  }

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
  int64_t tokens_per_group = problem.batch / problem.num_groups *
                             (problem.length - problem.num_prefix_tokens);
  Buffer<typename Math::Unit> projection(
      problem.proj.data ? packed_units(row_units<Math>(problem.model_dim), problem.joint_dim) : 0);
  int64_t class_stride = round_up(problem.joint_dim, lanes);
  bool has_few_classes = problem.num_classes <= max_few_classes;
  int64_t class_units = has_few_classes ? problem.num_classes * class_stride
                                        : packed_units(class_stride, problem.num_classes);
  Buffer<float> classes(problem.num_groups * class_units);
  Buffer<float> class_divisors(problem.num_groups * problem.num_classes);
  NormVector norm_weight(problem.norm_weight, problem.model_dim);
  NormVector norm_bias(problem.norm_bias, problem.model_dim);
  Job<Math> job{problem,
                norm_weight.values(),
                norm_bias.values(),
                projection,
                classes,
                class_divisors,
                class_stride,
                class_units,
                has_few_classes,
                divide_up(tokens_per_group, chunk_tokens)};
  double columns = problem.proj.data ? problem.joint_dim : problem.num_classes;
  double work_per_token = columns * problem.model_dim;
  if (work_per_token * tokens_per_group * problem.num_groups < min_parallel_work) threads = 1;
  if (problem.proj.data != nullptr) {
    run_workers(threads, num_projection_items(problem), pack_projection<Math>, &job);
  }
  read_classes(job);
  run_workers(threads, problem.num_groups * job.chunks_per_group, work<Math>, &job);
}

}  // namespace

void relevance(const Relevance& problem, int threads) {
  // Without a projection there is nothing to gain from products of bfloat16.
  with_math(problem.proj.data == nullptr ? Type::float32 : problem.proj.type,
            [&](auto math) { run<decltype(math)>(problem, threads); });
}

}  // namespace tir::cpu::TIR_ARCH
