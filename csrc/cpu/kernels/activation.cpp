// Activations with the bias in front of them, and their gradients; see adapters.h.
#include "../parallel.h"
#include "rows.h"
#include "tir/adapters.h"
#include "tir/rules.h"

namespace tir::cpu::TIR_ARCH {
namespace {

constexpr int64_t min_parallel_values = 32768;
constexpr int64_t rows_per_item = 8;

// An activation and its derivative at the same point.
struct Point {
  Vec value, slope;
};

// What becomes a type of 16 bits next has no use for float32's last bits, nor time for them.
template <bool is_short>
TIR_INLINE Vec power_of_two(Vec x) {
#if defined(__AVX512F__)
  if (is_short) return short_exp2(x);
#endif
  return exp2(x);
}

// erfcx(|x| / sqrt 2) / 2 as a polynomial in t = 1 / (1 + c |x|), without its constant, which is 0:
// to a relative 2e-8, or to 4e-5 as far as density is a number.
template <bool is_short>
TIR_INLINE Vec scaled_tail(Vec magnitude) {
  auto polynomial = [&](Vec t, Vec sum, auto... coefficients) {
    ((sum = multiply_add(sum, t, broadcast(coefficients))), ...);
    return sum * t;
  };
  auto fraction = [&](float c) {
    return broadcast(1.0f) / multiply_add(magnitude, broadcast(c), broadcast(1.0f));
  };
  if (is_short) {
    return polynomial(fraction(0.38f), broadcast(-0.08992829f), 0.18887635f, 0.09197984f,
                      0.15782945f, 0.15122513f);
  }
  return polynomial(fraction(0.26162951f), broadcast(0.031345949f), -0.15341692f, 0.24691682f,
                    -0.14644818f, 0.15788130f, 0.052260496f, 0.10336913f, 0.10368273f,
                    0.10440867f);
}

// x times the normal distribution's cumulative function, whose lower tail is
// erfcx(|x| / sqrt 2) exp(-x^2 / 2) / 2: nothing cancels, however small it gets.
template <bool is_short>
TIR_INLINE Point gelu_at(Vec x) {
  Vec density = power_of_two<is_short>(x * x * broadcast(-0.5f * log2_e));
  Vec tail = scaled_tail<is_short>(larger(x, zero() - x)) * density;
  Vec below = x > zero() ? broadcast(1.0f) - tail : tail;
  // Where x * x overflows the density is 0 and its product with x would be NaN for an infinity.
  Vec bell = density > zero() ? x * density * broadcast(0.3989423f) : zero();
  return {x * below, below + bell};
}

// x * sigmoid(gate), from -gate / ln 2 and the gate's derivative.
template <bool is_short>
TIR_INLINE Point gated_at(Vec x, Vec power, Vec gate_slope) {
  Vec exponential = power_of_two<is_short>(smaller(power, broadcast(127.0f)));
  Vec sigmoid = broadcast(1.0f) / (broadcast(1.0f) + exponential);
  sigmoid = power > broadcast(127.0f) ? zero() : sigmoid;
  Vec value = x * sigmoid;
  Vec change = value * (exponential * sigmoid);  // 1 - sigmoid would round where that is near 1
  // Where the gate's derivative is infinite the sigmoid is 0 or 1.
  Vec slope = multiply_add(change, gate_slope, sigmoid);
  return {value, change == zero() ? sigmoid : slope};
}

// x * sigmoid(1.702 x), as OpenAI's models have it.
template <bool is_short>
TIR_INLINE Point quick_gelu_at(Vec x) {
  return gated_at<is_short>(x, x * broadcast(-1.702f * log2_e), broadcast(1.702f));
}

// x * (1 + tanh(g / 2)) / 2 with g = sqrt(8 / pi) (x + 0.044715 x^3), which is x * sigmoid(g).
template <bool is_short>
TIR_INLINE Point gelu_tanh_at(Vec x) {
  constexpr float factor = 1.5957691216f, cubic = 0.044715f;
  Vec square = x * x;
  Vec inner = multiply_add(square, broadcast(factor * cubic), broadcast(factor));
  Vec slope = multiply_add(square, broadcast(3 * factor * cubic), broadcast(factor));
  return gated_at<is_short>(x, x * inner * broadcast(-log2_e), slope);
}

template <ActivationKind kind, bool is_short>
TIR_INLINE Point point_at(Vec x) {
  if (kind == ActivationKind::gelu) return gelu_at<is_short>(x);
  return kind == ActivationKind::quick_gelu ? quick_gelu_at<is_short>(x)
                                            : gelu_tanh_at<is_short>(x);
}

template <ActivationKind kind, bool has_gradient, class Row>
TIR_INLINE void activate(const typename Row::Element* hidden, const float* bias,
                         const typename Row::Element* grad_output,
                         typename Row::Element* output, int64_t count) {
  bool is_whole = count == lanes;
  Vec x = is_whole ? Row::read(hidden) : Row::read(hidden, count);
  x = x + load(bias);
  Point point = point_at<kind, sizeof(typename Row::Element) == 2>(x);
  Vec result = point.value;
  if (has_gradient) {
    Vec gradient = is_whole ? Row::read(grad_output) : Row::read(grad_output, count);
    result = gradient * point.slope;
  }
  if (is_whole) {
    Row::write(output, result);
  } else {
    Row::write(output, result, count);
  }
}

template <ActivationKind kind, bool has_gradient, class Row>
void activate_rows(void* data, ItemQueue& items) {
  const auto& problem = *static_cast<const Activation*>(data);
  using Element = typename Row::Element;
  auto* hidden = static_cast<const Element*>(problem.hidden);
  auto* grad_output = static_cast<const Element*>(problem.grad_output);
  auto* output = static_cast<Element*>(problem.output);
  int64_t channels = problem.channels;
  Buffer<float> bias(round_up(channels, lanes));
  if (problem.bias.data == nullptr) {
    for (int64_t i = 0; i < channels; i += lanes) store(bias + i, zero());
  } else {
    read_row(bias, problem.bias.data, problem.bias.type, channels);
  }
  for (int64_t item = items.take(); item >= 0; item = items.take()) {
    int64_t end = smaller_of((item + 1) * rows_per_item, problem.rows);
    for (int64_t row = item * rows_per_item; row < end; ++row) {
      for (int64_t i = 0; i < channels; i += lanes) {
        int64_t place = row * channels + i;
        const Element* gradient = has_gradient ? grad_output + place : nullptr;
        activate<kind, has_gradient, Row>(hidden + place, bias + i, gradient, output + place,
                                          smaller_of(lanes, channels - i));
      }
    }
  }
}

template <ActivationKind kind, class Row>
Worker worker_for(const Activation& problem) {
  return problem.grad_output == nullptr ? activate_rows<kind, false, Row>
                                        : activate_rows<kind, true, Row>;
}

}  // namespace

void activation(const Activation& problem, int threads) {
  if (problem.rows * problem.channels < min_parallel_values) threads = 1;
  with_row_type(problem.type, [&](auto row_type) {
    using Row = decltype(row_type);
    const Worker workers[] = {worker_for<ActivationKind::gelu, Row>(problem),
                              worker_for<ActivationKind::quick_gelu, Row>(problem),
                              worker_for<ActivationKind::gelu_tanh, Row>(problem)};
    run_workers(threads, divide_up(problem.rows, rows_per_item),
                workers[static_cast<int>(problem.kind)], const_cast<Activation*>(&problem));
  });
}

}  // namespace tir::cpu::TIR_ARCH
