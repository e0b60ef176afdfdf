// Exact top-k per class, counts, and the table's weights.
#include <algorithm>
#include <vector>

#include "cpu.h"
#include "parallel.h"
#include "tir/rules.h"

namespace tir::cpu {
namespace {

// Below this many relevances the work is shorter than waking threads.
constexpr int64_t min_parallel_values = 16384;

SelectionCut find_cut(const std::vector<uint32_t>& keys, int64_t top_k,
                      std::vector<uint32_t>& sorting_space) {
  sorting_space = keys;
  auto last_selected = sorting_space.begin() + (top_k - 1);
  std::nth_element(sorting_space.begin(), last_selected, sorting_space.end(),
                   [](uint32_t left, uint32_t right) { return left > right; });
  // The k - 1 tokens before the last selected one are at or above its key.
  uint32_t key = *last_selected;
  auto above = std::count_if(sorting_space.begin(), last_selected,
                             [key](uint32_t other) { return other > key; });
  return {key, top_k - above};
}

void count_selections(void* job, ItemQueue& items) {
  const Selection& problem = *static_cast<const Selection*>(job);
  int64_t num_patches = problem.num_patches;
  std::vector<uint32_t> keys(num_patches), sorting_space(num_patches);
  for (int64_t row = items.take(); row >= 0; row = items.take()) {
    const float* relevance = problem.relevance + row * num_patches;
    int32_t* counts = problem.counts + row / problem.num_classes * num_patches;
    std::transform(relevance, relevance + num_patches, keys.begin(), selection_key);
    SelectionCut cut = find_cut(keys, problem.top_k, sorting_space);
    int64_t ties = 0;
    for (int64_t n = 0; n < num_patches; ++n) {
      // The classes of an image may run on several threads; integers add up in any order.
      if (is_selected(keys[n], cut, ties)) __atomic_fetch_add(&counts[n], 1, __ATOMIC_RELAXED);
      ties += keys[n] == cut.key;
    }
  }
}

}  // namespace

void select_tokens(const Selection& problem, int threads) {
  int64_t num_rows = problem.batch * problem.num_classes;
  std::fill_n(problem.counts, problem.batch * problem.num_patches, 0);
  if (problem.top_k > 0) {
    bool is_small = num_rows * problem.num_patches < min_parallel_values;
    run_workers(is_small ? 1 : threads, num_rows, count_selections,
                const_cast<Selection*>(&problem));
  }
  look_up_weights({problem.batch, problem.num_patches, problem.num_prefix_tokens, problem.table,
                   problem.counts, problem.weights});
}

void look_up_weights(const WeightLookUp& problem) {
  int64_t length = problem.num_prefix_tokens + problem.num_patches;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int32_t* counts = problem.counts + b * problem.num_patches;
    for (int64_t token = 0; token < length; ++token) {
      problem.weights[b * length + token] =
          token_weight(token, problem.num_prefix_tokens, counts, problem.table);
    }
  }
}

}  // namespace tir::cpu
