#include "parallel.h"

#include <pthread.h>

#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace tir::cpu {
namespace {

using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads,
                              unsigned flags);
using OmpInParallel = int (*)();

GompParallel gomp_parallel = nullptr;
OmpInParallel omp_in_parallel = nullptr;

// A forked child has the parent's OpenMP runtime but not its threads, and would wait for them for
// ever: plain threads work there.
bool is_forked_child = false;
// A job that calls for another job from inside a plain thread runs it inline.
thread_local bool is_plain_worker = false;

const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

struct Team {
  Worker worker;
  void* job;
  ItemQueue items;
  std::mutex mutex;
  std::exception_ptr failure;
};

// Neither OpenMP nor a plain thread lets an exception through: keep the first one for the caller.
void work(void* data) {
  Team& team = *static_cast<Team*>(data);
  try {
    team.worker(team.job, team.items);
  } catch (...) {
    std::lock_guard<std::mutex> lock(team.mutex);
    if (!team.failure) team.failure = std::current_exception();
  }
}

void run_on_plain_threads(int threads, Team& team) {
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i) {
      others.emplace_back([&team] {
        is_plain_worker = true;
        work(&team);
      });
    }
  } catch (const std::system_error&) {
    // No more threads to be had: those that started, and this one, empty the queue.
  }
  work(&team);
  for (std::thread& other : others) other.join();
}

}  // namespace

int64_t ItemQueue::take() {
  int64_t item = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
  return item < count_ ? item : -1;
}

void run_workers(int threads, int64_t num_items, Worker worker, void* job) {
  if (num_items <= 0) return;
  Team team{worker, job, ItemQueue(num_items), {}, nullptr};
  bool is_nested = is_plain_worker || (omp_in_parallel != nullptr && omp_in_parallel() != 0);
  if (threads <= 1 || num_items == 1 || is_nested) {
    work(&team);
  } else if (gomp_parallel != nullptr && !is_forked_child) {
    // Always the full team, however few the items: a team that changes its size from call to call
    // makes the runtime end and start threads.
    gomp_parallel(work, &team, static_cast<unsigned>(threads), 0);
  } else {
    run_on_plain_threads(threads < num_items ? threads : static_cast<int>(num_items), team);
  }
  if (team.failure) std::rethrow_exception(team.failure);
}

void use_openmp(uintptr_t parallel_address, uintptr_t in_parallel_address) {
  gomp_parallel = reinterpret_cast<GompParallel>(parallel_address);
  omp_in_parallel = reinterpret_cast<OmpInParallel>(in_parallel_address);
}

const char* thread_source() { return gomp_parallel ? "OpenMP of torch" : "plain threads"; }

namespace {

constexpr size_t alignment = 64;

void* new_block(size_t bytes) { return ::operator new(bytes, std::align_val_t(alignment)); }
void delete_block(void* block) { ::operator delete(block, std::align_val_t(alignment)); }

// Memory that a thread keeps from call to call, unless it is large. An allocator would give it back
// to the system after each call, which would clear its pages anew for the next.
class Scratch {
 public:
  ~Scratch() { delete_block(start_); }

  void* take(size_t bytes) {
    // A line even for nothing, whose address would be that of what follows.
    bytes = bytes / alignment * alignment + alignment;
    ++num_taken_;
    wanted_ += bytes;
    if (wanted_ > size_) return new_block(bytes);
    return start_ + (wanted_ - bytes);
  }

  void give_back(void* memory) {
    auto* place = static_cast<char*>(memory);
    if (place < start_ || place >= start_ + size_) delete_block(memory);
    if (--num_taken_ > 0) return;
    if (wanted_ > size_ && wanted_ <= max_kept) grow(wanted_);
    wanted_ = 0;
  }

 private:
  static constexpr size_t max_kept = size_t{16} << 20;

  void grow(size_t size) {
    delete_block(start_);
    start_ = nullptr;
    size_ = 0;
    // Called by destructors: what cannot be kept is asked for again.
    start_ = static_cast<char*>(::operator new(size, std::align_val_t(alignment), std::nothrow));
    if (start_ != nullptr) size_ = size;
  }

  char* start_ = nullptr;
  size_t size_ = 0, wanted_ = 0;
  int64_t num_taken_ = 0;
};

thread_local Scratch scratch;

}  // namespace

void* allocate(int64_t bytes) { return scratch.take(static_cast<size_t>(bytes)); }

void release(void* memory) { scratch.give_back(memory); }

}  // namespace tir::cpu
