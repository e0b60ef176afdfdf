// Exact top-k per class, counts, and the table's weights.
#include <algorithm>
#include <vector>

#include "cpu.h"
#include "parallel.h"
#include "tir/rules.h"

namespace tir::cpu {
namespace {

// Below this many relevances the work is shorter than waking threads.
constexpr int64_t min_parallel_values = 65536;

struct Job {
  const Selection& problem;
  int64_t rows_per_item;  // whole images, or the classes of one on several threads
};

// Bit after bit: the largest number that at least top_k keys reach. A pass over vectors of keys for
// each takes less time than to partition them, where every other branch is mispredicted.
SelectionCut find_cut(const std::vector<uint32_t>& keys, int64_t top_k) {
  auto count_from = [&](uint32_t smallest) {
    int32_t count = 0;
    for (uint32_t key : keys) count += key >= smallest;
    return count;
  };
  uint32_t cut = 0;
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    int64_t count = count_from(cut | bit);
    if (count < top_k) continue;
    cut |= bit;
    if (count == top_k) return {cut - 1, 0};
  }
  // It is a key: of those equal to it, not all are selected.
  int64_t above = cut == UINT32_MAX ? 0 : count_from(cut + 1);
  return {cut, top_k - above};
}

void count_selections(void* data, ItemQueue& items) {
  const Job& job = *static_cast<const Job*>(data);
  const Selection& problem = job.problem;
  int64_t num_patches = problem.num_patches;
  std::vector<uint32_t> keys(num_patches);
  for (int64_t item = items.take(); item >= 0; item = items.take()) {
    int64_t first = item * job.rows_per_item;
    for (int64_t row = first; row < first + job.rows_per_item; ++row) {
      const float* relevance = problem.relevance + row * num_patches;
      int32_t* counts = problem.counts + row / problem.num_classes * num_patches;
      std::transform(relevance, relevance + num_patches, keys.begin(), selection_key);
      SelectionCut cut = find_cut(keys, problem.top_k);
      if (cut.ties == 0 && job.rows_per_item == problem.num_classes) {
        for (int64_t n = 0; n < num_patches; ++n) counts[n] += keys[n] > cut.key;
        continue;
      }
      int64_t ties = 0;
      for (int64_t n = 0; n < num_patches; ++n) {
        // Other threads may count the same image's tokens; integers add up in any order.
        if (is_selected(keys[n], cut, ties)) __atomic_fetch_add(&counts[n], 1, __ATOMIC_RELAXED);
        ties += keys[n] == cut.key;
      }
    }
  }
}

}  // namespace

void select_tokens(const Selection& problem, int threads) {
  int64_t num_rows = problem.batch * problem.num_classes;
  std::fill_n(problem.counts, problem.batch * problem.num_patches, 0);
  if (problem.top_k > 0) {
    if (num_rows * problem.num_patches < min_parallel_values) threads = 1;
    Job job{problem, problem.batch >= threads ? problem.num_classes : 1};
    run_workers(threads, num_rows / job.rows_per_item, count_selections, &job);
  }
  look_up_weights({problem.batch, problem.num_patches, problem.num_prefix_tokens, problem.table,
                   problem.counts, problem.weights});
}

void token_weights(void (*relevance)(const Relevance&, int threads), const Relevance& problem,
                   const Selection& selection, int threads) {
  Buffer<float> cosines(selection.batch * selection.num_classes * selection.num_patches);
  Relevance into = problem;
  into.relevance = cosines;
  relevance(into, threads);
  Selection from = selection;
  from.relevance = cosines;
  select_tokens(from, threads);
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
