// Exact top-k of one class by one warp.
#pragma once

#include "cuda/device.cuh"
#include "tir/rules.h"

namespace tir::cuda {

// The cut of which `each_key` calls visit(key) for all keys of this lane, between `smallest` and
// `largest` of the warp; it may add keys of 0. The k-th largest key is found bit by bit, from the
// first bit in which keys differ: a bit is set if at least k keys remain. It ends early where
// exactly k remain.
template <class EachKey>
TIR_DEVICE SelectionCut search_cut(EachKey each_key, unsigned smallest, unsigned largest,
                                   int top_k) {
  unsigned threshold = smallest, differing = smallest ^ largest;
  if (differing != 0) {
    int bit = 31 - __clz(static_cast<int>(differing));
    threshold = largest & ~((2u << bit) - 1u);
    for (; bit >= 0; --bit) {
      unsigned candidate = threshold | 1u << bit, reached = 0;
      each_key([&](unsigned key) { reached += key >= candidate ? 1 : 0; });
      reached = __reduce_add_sync(kAllLanes, reached);
      if (reached < static_cast<unsigned>(top_k)) continue;
      threshold = candidate;
      if (reached == static_cast<unsigned>(top_k)) return {threshold - 1, 0};
    }
  }
  unsigned above = 0;
  each_key([&](unsigned key) { above += key > threshold ? 1 : 0; });
  above = __reduce_add_sync(kAllLanes, above);
  return {threshold, top_k - static_cast<int>(above)};
}

// Keeps a lane's keys in registers: the search goes over them up to 32 times.
template <int kHeld, class KeyOf>
TIR_DEVICE SelectionCut find_cut_held(KeyOf key_of, int count, int top_k, int lane) {
  unsigned held[kHeld], smallest = 0xffffffffu, largest = 0;
  TIR_UNROLL
  for (int i = 0; i < kHeld; ++i) {
    bool exists = lane + i * kWarp < count;
    held[i] = exists ? key_of(lane + i * kWarp) : 0;
    smallest = exists && held[i] < smallest ? held[i] : smallest;
    largest = held[i] > largest ? held[i] : largest;
  }
  auto each_key = [&](auto visit) {
    TIR_UNROLL
    for (int i = 0; i < kHeld; ++i) visit(held[i]);
  };
  return search_cut(each_key, __reduce_min_sync(kAllLanes, smallest),
                    __reduce_max_sync(kAllLanes, largest), top_k);
}

// Where a class stops selecting among `count` tokens; key_of(n) is token n's selection key.
template <class KeyOf>
TIR_DEVICE SelectionCut find_cut(KeyOf key_of, int count, int top_k, int lane) {
  if (top_k == 0) return {0xffffffffu, 0};
  if (count <= 8 * kWarp) return find_cut_held<8>(key_of, count, top_k, lane);
  if (count <= 25 * kWarp) return find_cut_held<25>(key_of, count, top_k, lane);
  auto each_key = [&](auto visit) {
    for (int n = lane; n < count; n += kWarp) visit(key_of(n));
  };
  unsigned smallest = 0xffffffffu, largest = 0;
  each_key([&](unsigned key) {
    smallest = key < smallest ? key : smallest;
    largest = key > largest ? key : largest;
  });
  return search_cut(each_key, __reduce_min_sync(kAllLanes, smallest),
                    __reduce_max_sync(kAllLanes, largest), top_k);
}

// Calls select(n) for every token that the cut selects.
template <class KeyOf, class Select>
TIR_DEVICE void select_by(SelectionCut cut, KeyOf key_of, int count, int lane, Select select) {
  int earlier_ties = 0;
  for (int first = 0; first < count; first += kWarp) {
    int n = first + lane;
    unsigned key = n < count ? key_of(n) : 0;
    bool ties = n < count && key == cut.key;
    unsigned tied = __ballot_sync(kAllLanes, ties);
    int before = earlier_ties + __popc(tied & ((1u << lane) - 1u));
    if (n < count && is_selected(key, cut, before)) select(n);
    earlier_ties += __popc(tied);
  }
}

}  // namespace tir::cuda
