// Dropout from counted random numbers; see adapters.h.
#include "../parallel.h"
#include "rows.h"
#include "tir/adapters.h"

namespace tir::cpu::TIR_ARCH {
namespace {

// Below this many values the work is shorter than waking threads.
constexpr int64_t min_parallel_values = 32768;

// The low and the high halves of 32-bit products.
struct Product {
  UintVec low, high;
};

TIR_INLINE Product multiply(UintVec values, uint32_t factor) {
#if defined(__AVX512F__)
  __m512i factors = _mm512_set1_epi32(static_cast<int>(factor));
  __m512i even = _mm512_mul_epu32((__m512i)values, factors);
  __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)values, 32), factors);
  __m512i low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  __m512i high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  return {(UintVec)low, (UintVec)high};
#elif defined(__AVX2__)
  __m256i factors = _mm256_set1_epi32(static_cast<int>(factor));
  __m256i even = _mm256_mul_epu32((__m256i)values, factors);
  __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)values, 32), factors);
  __m256i low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  __m256i high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  return {(UintVec)low, (UintVec)high};
#else
  UintVec high;
  for (int i = 0; i < lanes; ++i) {
    high[i] = static_cast<uint32_t>((static_cast<uint64_t>(values[i]) * factor) >> 32);
  }
  return {values * factor, high};
#endif
}

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
TIR_INLINE void philox(UintVec (&counter)[4], uint64_t seed) {
  auto key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    Product first = multiply(counter[0], 0xD2511F53u);
    Product second = multiply(counter[2], 0xCD9E8D57u);
    counter[0] = second.high ^ counter[1] ^ key_0;
    counter[1] = second.low;
    counter[2] = first.high ^ counter[3] ^ key_1;
    counter[3] = first.low;
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
}

// The values of one slot of a draw: `count` channels from `offset` on.
template <class In, class Out>
TIR_INLINE void write_kept(const typename In::Element* source, typename Out::Element* target,
                           int64_t offset, int64_t count, UintVec bits, uint32_t threshold,
                           Vec scale) {
  IntVec is_kept = (IntVec)(bits >= threshold);
  Vec value = count == lanes ? In::read(source + offset) : In::read(source + offset, count);
  // Dropped values become 0 even where they are not finite.
  Vec kept = (Vec)((IntVec)(value * scale) & is_kept);
  if (count == lanes) {
    Out::write(target + offset, kept);
  } else {
    Out::write(target + offset, kept, count);
  }
}

template <class In, class Out>
void drop_row(const PhiloxDropout& problem, int64_t group, int64_t branch, int64_t sequence,
              int64_t position) {
  int64_t row = (group * problem.sequences + sequence) * problem.length + position;
  int64_t output_row =
      ((group * problem.branches + branch) * problem.sequences + sequence) * problem.length +
      position;
  auto* source = static_cast<const typename In::Element*>(problem.rows.data);
  auto* target = static_cast<typename Out::Element*>(problem.output);
  source += row * problem.channels;
  target += output_row * problem.channels;
  int64_t blocks = divide_up(problem.channels, channels_per_draw);
  uint32_t place = problem.stream << 24 |
                   (problem.first_branch + static_cast<uint32_t>(branch)) << 16;
  UintVec lane{};
  for (int i = 0; i < lanes; ++i) lane[i] = static_cast<uint32_t>(i);
  Vec scale = broadcast(problem.scale);
  for (int64_t block = 0; block < blocks; block += lanes) {
    UintVec counter[4] = {(lane + static_cast<uint32_t>(block)) | place,
                          UintVec{} + static_cast<uint32_t>(position),
                          UintVec{} + static_cast<uint32_t>(sequence),
                          UintVec{} + static_cast<uint32_t>(problem.step)};
    philox(counter, static_cast<uint64_t>(problem.seeds[group]));
    for (int slot = 0; slot < channels_per_draw; ++slot) {
      int64_t offset = slot * blocks + block;
      int64_t count = smaller_of(smaller_of(blocks - block, lanes), problem.channels - offset);
      if (count <= 0) break;
      UintVec word = counter[slot / 2];
      UintVec bits = slot % 2 == 0 ? word & 0xffffu : word >> 16;
      write_kept<In, Out>(source, target, offset, count, bits, problem.threshold, scale);
    }
  }
}

template <class In, class Out>
void drop_rows(void* data, ItemQueue& items) {
  const auto& problem = *static_cast<const PhiloxDropout*>(data);
  // An item is a sequence of a branch.
  for (int64_t item = items.take(); item >= 0; item = items.take()) {
    int64_t sequence = item % problem.sequences;
    int64_t branch = item / problem.sequences % problem.branches;
    int64_t group = item / problem.sequences / problem.branches;
    for (int64_t position = 0; position < problem.length; ++position) {
      drop_row<In, Out>(problem, group, branch, sequence, position);
    }
  }
}

}  // namespace

void philox_dropout(const PhiloxDropout& problem, int threads) {
  int64_t items = problem.groups * problem.branches * problem.sequences;
  if (items * problem.length * problem.channels < min_parallel_values) threads = 1;
  with_row_type(problem.rows.type, [&](auto in) {
    with_row_type(problem.output_type, [&](auto out) {
      run_workers(threads, items, drop_rows<decltype(in), decltype(out)>,
                  const_cast<PhiloxDropout*>(&problem));
    });
  });
}

}  // namespace tir::cpu::TIR_ARCH
