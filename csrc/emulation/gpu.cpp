#include "cuda/device.cuh"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace tir::emulation {

Lane current;

namespace {

constexpr int kSlot = 64;  // bytes a lane can hand over
constexpr size_t kStack = 128 * 1024;

enum class State { runnable, at_exchange, at_barrier, finished };

struct Copy {
  void* shared;
  const void* global;
  bool exists;

  void land() const {
    if (exists) {
      memcpy(shared, global, 16);
    } else {
      memset(shared, 0, 16);
    }
  }
};

struct Thread {
  Fiber fiber;
  std::unique_ptr<unsigned char[]> stack;
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state;
  Exchange kind;
  Lane lane;
  std::vector<std::vector<Copy>> commits;
  std::vector<Copy> uncommitted;
};

struct Warp {
  unsigned char slots[2][32 * kSlot];
  int turn;     // which half the next exchange uses
  int arrived;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  const std::function<void()>* body = nullptr;
  int running = 0;
  std::string error;  // what a thread did wrong: a fiber cannot throw into the scheduler
};

Block block;
Fiber scheduler;
uint64_t thread_order = 0;
std::mt19937_64 dice;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack;
size_t scheduler_stack_size;
#endif

Thread& running() { return block.threads[block.running]; }

void to_scheduler(bool is_last) {
  Thread& self = running();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(is_last ? nullptr : &self.fake_stack, scheduler_stack,
                                 scheduler_stack_size);
#else
  (void)is_last;
#endif
  switch_fibers(self.fiber, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

[[noreturn]] void fail(const char* what) {
  block.error = what;
  to_scheduler(true);
  abort();
}

void to_thread(int index) {
  block.running = index;
  Thread& next = running();
  current = next.lane;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, next.stack.get(), kStack);
#endif
  switch_fibers(scheduler, next.fiber);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*block.body)();
  running().state = State::finished;
  to_scheduler(true);
}

void start_threads(dim3 block_index, dim3 grid, dim3 size, const std::function<void()>& body) {
  unsigned count = size.x * size.y * size.z;
  block.body = &body;
  block.threads.resize(count);
  block.warps.assign((count + 31) / 32, Warp{});
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    if (!thread.stack) thread.stack.reset(new unsigned char[kStack]);
    thread.state = State::runnable;
    thread.commits.clear();
    thread.uncommitted.clear();
    dim3 index(i % size.x, i / size.x % size.y, i / (size.x * size.y));
    thread.lane = {index, block_index, size, grid, i % 32};
    prepare(thread.fiber, thread.stack.get(), kStack, thread_main);
  }
}

void arrange(std::vector<int>& indices) {
  if (thread_order == 1) std::reverse(indices.begin(), indices.end());
  if (thread_order > 1) std::shuffle(indices.begin(), indices.end(), dice);
}

// Runs the lanes of a warp until all of them wait for the block or are done.
void run_warp(int warp) {
  int first = 32 * warp, last = std::min<int>(first + 32, block.threads.size());
  for (bool moved = true; moved;) {
    moved = false;
    std::vector<int> lanes;
    for (int i = first; i < last; ++i) {
      if (block.threads[i].state == State::runnable) lanes.push_back(i);
    }
    arrange(lanes);
    for (int lane : lanes) {
      to_thread(lane);
      if (!block.error.empty()) return;
      moved = true;
    }
  }
}

// Empty if the block ran to its end, else what went wrong.
std::string run_block() {
  int warps = static_cast<int>(block.warps.size());
  for (;;) {
    std::vector<int> order(warps);
    for (int i = 0; i < warps; ++i) order[i] = i;
    arrange(order);
    for (int warp : order) {
      run_warp(warp);
      if (!block.error.empty()) return block.error;
    }
    size_t finished = 0, waiting = 0;
    for (Thread& thread : block.threads) {
      finished += thread.state == State::finished;
      waiting += thread.state == State::at_barrier;
    }
    if (finished == block.threads.size()) return "";
    if (waiting != block.threads.size()) {
      return waiting > 0 ? "not all threads come to a barrier" : "a warp's lanes part ways";
    }
    for (Thread& thread : block.threads) thread.state = State::runnable;
  }
}

}  // namespace

void block_barrier() {
  running().state = State::at_barrier;
  to_scheduler(false);
}

const unsigned char* exchange(Exchange kind, const void* own, int bytes) {
  Thread& self = running();
  int first = block.running / 32 * 32;
  Warp& warp = block.warps[block.running / 32];
  unsigned char* slots = warp.slots[warp.turn];
  if (bytes > 0) memcpy(slots + kSlot * self.lane.lane, own, bytes);
  self.kind = kind;
  if (++warp.arrived == 32) {
    for (int i = first; i < first + 32; ++i) {
      if (block.threads[i].kind != kind) fail("a warp's lanes part ways");
      block.threads[i].state = State::runnable;
    }
    warp.arrived = 0;
    warp.turn ^= 1;
  } else {
    self.state = State::at_exchange;
    to_scheduler(false);
  }
  return slots;
}

void copy_async(void* shared, const void* global, bool exists) {
  auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (!is_aligned(shared) || (exists && !is_aligned(global))) {
    fail("an asynchronous copy off a 16-byte boundary");
  }
  Copy copy{shared, global, exists};
  if (thread_order > 1 && dice() % 2 == 0) {
    copy.land();
  } else {
    running().uncommitted.push_back(copy);
  }
}

void commit_copies() {
  Thread& self = running();
  self.commits.push_back(std::move(self.uncommitted));
  self.uncommitted.clear();
}

void wait_for_copies(int pending) {
  std::vector<std::vector<Copy>>& commits = running().commits;
  while (static_cast<int>(commits.size()) > pending) {
    for (const Copy& copy : commits.front()) copy.land();
    commits.erase(commits.begin());
  }
}

unsigned char* shared_memory() { return block.shared.get(); }

void run(const char* kernel, dim3 grid, dim3 size, size_t shared_bytes,
         const std::function<void()>& thread) {
  if (size.x * size.y * size.z % 32 != 0) throw std::runtime_error("a warp that is not whole");
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        // Of the exact size, and anew for every block, so that what lies past it is found.
        block.shared.reset(new unsigned char[shared_bytes]);
        memset(block.shared.get(), 0xff, shared_bytes);
        start_threads({x, y, z}, grid, size, thread);
        block.error.clear();
        std::string error = run_block();
        if (!error.empty()) {
          throw std::runtime_error(std::string(kernel) + ", block " + std::to_string(x) + ": " +
                                   error);
        }
      }
    }
  }
  block.shared.reset();
}

void set_thread_order(uint64_t order) {
  thread_order = order;
  dice.seed(order);
}

float half_to_float(uint16_t bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(fraction), -24)
                    : exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                                     : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

uint16_t float_to_half(float value) {
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14);
  // In units of the last place; rounds to even, and a carry moves into the exponent by itself.
  auto units = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return sign | static_cast<uint16_t>(units + ((exponent + 14) << 10));
}

uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float add_products(float total, const double* products, int count) {
  double plain = total, largest = std::fabs(plain);
  for (int i = 0; i < count; ++i) {
    plain += products[i];
    largest = std::max(largest, std::fabs(products[i]));
  }
  if (plain == 0.0 || !std::isfinite(plain)) return static_cast<float>(plain);
  double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  double units = std::trunc(total / unit);
  for (int i = 0; i < count; ++i) units += std::trunc(products[i] / unit);
  float sum = static_cast<float>(units * unit);
  bool is_too_large = std::isfinite(sum) && std::fabs(sum) > std::fabs(units * unit);
  return is_too_large ? std::nextafter(sum, 0.0f) : sum;
}

}  // namespace tir::emulation
