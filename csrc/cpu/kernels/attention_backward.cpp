// Backward pass of weighted attention: which gradients each worker takes.
//
// Usually one worker takes a whole (batch, head) and five products per tile. Where there are fewer
// of these than threads, two passes share them: one cut along the keys for their gradients, one
// cut along the queries for theirs, at the price of computing the scores twice.
#include "backward_worker.h"
#include "few_queries.h"

namespace tir::cpu::TIR_ARCH {
namespace {

struct Job {
  const AttentionBackward& problem;
  const KeyLists& attended;
  const KeyLists* ignored;  // keys of weight 0, where the gradient of their weight is wanted
  float* head_grads;        // [B, H, L] gradients of the scaled weights per head, or null
  Pass pass;
  int64_t num_parts;  // of each (batch, head)
  int threads;
};

// Gradients of keys, values and weights, with a part of a head's keys stationary and all of its
// queries streamed; where one pass gives everything, those of queries too.
template <class Math>
void grad_key_value(BackwardWorker<Math>& worker, const Job& job, int64_t batch_head,
                    int64_t part) {
  const AttentionShape& shape = job.problem.shape;
  int64_t num_tiles = worker.num_tiles();
  KeyList keys = job.attended.of(batch_head / shape.heads);
  float* head_grads = job.head_grads ? job.head_grads + batch_head * shape.length : nullptr;
  KeyPart own = part_of(keys, part, job.num_parts, shape.length);
  if (own.keys.count > 0) {
    Wanted wanted{job.pass == Pass::everything, true, head_grads != nullptr};
    worker.run(own.keys, 0, num_tiles, wanted);
    if (head_grads != nullptr) worker.write_weights(head_grads);
  } else if (job.pass == Pass::everything) {
    worker.write_zero_queries(0, num_tiles);
  }
  worker.write_key_value(own.keys, own.first_row, own.end_row);
  // Where an image has no attended key, all gradients are 0, those of its weights too.
  if (job.ignored != nullptr && keys.count > 0) {
    KeyList ignored = job.ignored->of(batch_head / shape.heads);
    KeyPart ignored_part = part_of(ignored, part, job.num_parts, shape.length);
    if (ignored_part.keys.count > 0) {
      worker.run(ignored_part.keys, 0, num_tiles, {false, false, true});
      worker.write_weights(head_grads);
    }
  }
}

// Gradients of queries, with a part of a head's queries stationary and all of its keys streamed.
template <class Math>
void grad_query(BackwardWorker<Math>& worker, const Job& job, int64_t batch_head, int64_t part) {
  int64_t heads = job.problem.shape.heads, num_tiles = worker.num_tiles();
  int64_t first = num_tiles * part / job.num_parts;
  int64_t end = num_tiles * (part + 1) / job.num_parts;
  KeyList keys = job.attended.of(batch_head / heads);
  if (keys.count == 0) {
    worker.write_zero_queries(first, end);
  } else {
    worker.run(keys, first, end, {true, false, false});
  }
}

template <class Math>
void work(void* data, ItemQueue& items) {
  const Job& job = *static_cast<const Job*>(data);
  BackwardWorker<Math> worker(job.problem, job.pass == Pass::queries);
  int64_t heads = job.problem.shape.heads;
  for (int64_t item = items.take(); item >= 0; item = items.take()) {
    int64_t part = item % job.num_parts, batch_head = item / job.num_parts;
    worker.choose(batch_head / heads, batch_head % heads);
    // The queue gives the workers one each in turn.
    if (job.num_parts == 1) {
      worker.expect_next(batch_head + job.threads, job.attended.of(batch_head / heads).count);
    }
    if (job.pass == Pass::queries) {
      grad_query(worker, job, batch_head, part);
    } else {
      grad_key_value(worker, job, batch_head, part);
    }
  }
}

void work_on_few_queries(void* data, ItemQueue& items) {
  const Job& job = *static_cast<const Job*>(data);
  const AttentionShape& shape = job.problem.shape;
  HeadGroups groups(shape, job.problem.key, job.threads);
  FewQueries worker(shape);
  for (int64_t item = items.take(); item >= 0; item = items.take()) {
    HeadGroup group = groups.at(item);
    int64_t first_head = group.batch * shape.heads + group.first;
    float* head_grads = job.head_grads ? job.head_grads + first_head * shape.length : nullptr;
    KeyList keys = job.attended.of(group.batch);
    worker.differentiate(job.problem, group, keys, head_grads);
    // Where an image has no attended key, all gradients are 0, those of its weights too.
    if (job.ignored != nullptr && keys.count > 0) {
      worker.differentiate_ignored(job.problem, group, job.ignored->of(group.batch), head_grads);
    }
  }
}

void multiply_by_powers(float* grads, const KeyList& keys) {
  if (keys.exponent == nullptr) return;
  for (int64_t i = 0; i < keys.count; ++i) {
    float& grad = grads[keys.index[i]];
    grad = __builtin_ldexpf(grad, -static_cast<int>(keys.exponent[i]));
  }
}

// The heads' gradients in the order of the heads. The powers of two that weights were scaled by
// come last: with them, two heads' gradients could be infinities of opposite sign.
void sum_over_heads(const AttentionShape& shape, const float* head_grads, const KeyLists& attended,
                    const KeyLists& ignored, float* grad_weights) {
  for (int64_t b = 0; b < shape.batch; ++b) {
    float* sums = grad_weights + b * shape.length;
    for (int64_t i = 0; i < shape.length; ++i) sums[i] = 0;
    for (int64_t h = 0; h < shape.heads; ++h) {
      const float* grads = head_grads + (b * shape.heads + h) * shape.length;
      for (int64_t i = 0; i < shape.length; ++i) sums[i] += grads[i];
    }
    multiply_by_powers(sums, attended.of(b));
    multiply_by_powers(sums, ignored.of(b));
  }
}

}  // namespace

void attention_backward(const AttentionBackward& problem, int threads) {
  const AttentionShape& shape = problem.shape;
  if (attention_work(shape) < min_parallel_work) threads = 1;
  int64_t num_heads = shape.batch * shape.heads;
  bool wants_weights = problem.grad_weights != nullptr;
  KeyLists attended(problem.weights, shape.batch, shape.length, KeyLists::Which::positive);
  KeyLists ignored(problem.weights, wants_weights ? shape.batch : 0, shape.length,
                   KeyLists::Which::zero);
  Buffer<float> head_grads(wants_weights ? num_heads * shape.length : 0);
  if (wants_weights) memset(head_grads, 0, num_heads * shape.length * sizeof(float));

  Job job{problem, attended, nullptr, nullptr, Pass::everything, 1, threads};
  if (wants_weights) {
    job.ignored = &ignored;
    job.head_grads = head_grads;
  }
  if (has_few_queries(shape)) {
    HeadGroups groups(shape, problem.key, threads);
    run_workers(threads, groups.count(), work_on_few_queries, &job);
  } else {
    with_math(shape.type, [&](auto math) {
      using Math = decltype(math);
      run_passes(threads, work<Math>, Math::tile_queries, job);
    });
  }
  if (wants_weights) sum_over_heads(shape, head_grads, attended, ignored, problem.grad_weights);
}

}  // namespace tir::cpu::TIR_ARCH
