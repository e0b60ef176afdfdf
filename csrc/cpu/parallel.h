// Threads: borrowed from the OpenMP runtime that is already in the process.
#pragma once

#include <cstdint>

namespace tir::cpu {

// The items of a job, handed to whichever thread asks next. Which thread computes an item never
// changes the item's result, so the schedule is free to follow the load of the machine.
class ItemQueue {
 public:
  explicit ItemQueue(int64_t count) : count_(count) {}

  // The next item, or -1 when all are taken.
  int64_t take();

 private:
  int64_t count_;
  int64_t next_ = 0;  // changed atomically only
};

using Worker = void (*)(void* job, ItemQueue& items);

// Runs `worker` on up to `threads` threads, the caller's included, until the queue is empty.
// Exceptions of a worker reach the caller.
void run_workers(int threads, int64_t num_items, Worker worker, void* job);

// Addresses of GOMP_parallel and omp_in_parallel of the process's OpenMP runtime; 0 where unknown.
void use_openmp(uintptr_t gomp_parallel, uintptr_t omp_in_parallel);

// Where threads come from, in words.
const char* thread_source();

// Memory of a thread, aligned to cache lines, given back by the same thread; its content is undefined.
void* allocate(int64_t bytes);
void release(void* memory);

// A worker's own array. Always inlined: it is used by code of several instruction sets, and the
// linker keeps only one copy of an inline function that is not.
template <class T>
class Buffer {
 public:
  __attribute__((always_inline)) explicit Buffer(int64_t count)
      : values_(static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))))) {}
  __attribute__((always_inline)) ~Buffer() { release(values_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  __attribute__((always_inline)) operator T*() const { return values_; }

 private:
  T* values_;
};

}  // namespace tir::cpu
