// What several test files share: random rows cut into segments, a context with threads, every instruction set.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "flatmtl.h"

// A parallel_for on a number of std::threads of its own.
inline void threads_for(int64_t begin, int64_t end, int64_t grain, flatmtl_range_fn fn, void *context, void *host) {
  const int64_t count = *static_cast<const int *>(host);
  const int64_t share = std::max<int64_t>(grain, (end - begin + count - 1) / count);
  std::vector<std::thread> threads;
  for (int64_t at = begin; at < end; at += share) threads.emplace_back(fn, at, std::min(at + share, end), context);
  for (auto &thread : threads) thread.join();
}

// A context with exactly the memory that the library asks for.
struct Context {
  explicit Context(int32_t num_tasks, int threads = 1) : threads(threads) {
    size_t bytes = 0;
    if (flatmtl_workspace_size(num_tasks, &bytes, nullptr) != FLATMTL_OK) std::abort();
    value.workspace = std::aligned_alloc(64, bytes);
    value.workspace_size = bytes;
    value.parallel_for = threads > 1 ? threads_for : nullptr;
    value.host = &this->threads;
  }
  ~Context() { std::free(value.workspace); }
  Context(const Context &) = delete;
  Context &operator=(const Context &) = delete;
  operator const flatmtl_context *() const { return &value; }

  int threads;
  flatmtl_context value{};
};

// The instruction sets that this build and this CPU have.
inline std::vector<std::string> instruction_sets() {
  const std::string now = flatmtl_isa();
  std::vector<std::string> found;
  for (const char *name : {"base", "avx2", "avx512", "neon"})
    if (flatmtl_select_isa(name, nullptr) == FLATMTL_OK) found.push_back(name);
  flatmtl_select_isa(now.c_str(), nullptr);
  return found;
}

inline size_t size_of(flatmtl_dtype dtype) {
  return dtype == FLATMTL_F64 ? 8 : dtype == FLATMTL_F32 ? 4 : 2;
}

// IEEE binary16 to double, by its definition.
inline double half_value(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double sign = h >> 15 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return exponent ? sign * std::ldexp(1024 + mantissa, exponent - 25) : sign * std::ldexp(mantissa, -24);
}

inline double bf16_value(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// num_rows vectors of one dtype, each cut into segments with a guard of one element between them.
struct Rows {
  Rows(flatmtl_dtype dtype, int32_t num_rows, std::vector<int64_t> lengths)
      : dtype(dtype), num_rows(num_rows), lengths(std::move(lengths)) {
    int64_t total = 0;
    for (int64_t n : this->lengths) total += n + 1;
    bytes.resize(static_cast<size_t>(total * num_rows) * size_of(dtype) + 64, 0x7b);
    size_t at = 0;
    for (int32_t i = 0; i < num_rows; i++)
      for (int64_t n : this->lengths) {
        pointers.push_back(bytes.data() + at);
        at += static_cast<size_t>(n + 1) * size_of(dtype);
      }
  }

  int64_t length() const {
    int64_t total = 0;
    for (int64_t n : lengths) total += n;
    return total;
  }
  void *at(int32_t row, int64_t p) const {
    size_t t = 0;
    while (p >= lengths[t]) p -= lengths[t++];
    return static_cast<char *>(pointers[static_cast<size_t>(row) * lengths.size() + t]) +
           static_cast<size_t>(p) * size_of(dtype);
  }
  double get(int32_t row, int64_t p) const {
    float f;
    double d;
    uint16_t h;
    switch (dtype) {
      case FLATMTL_F32:
        std::memcpy(&f, at(row, p), 4);
        return f;
      case FLATMTL_F64:
        std::memcpy(&d, at(row, p), 8);
        return d;
      default:
        std::memcpy(&h, at(row, p), 2);
        return dtype == FLATMTL_F16 ? half_value(h) : bf16_value(h);
    }
  }
  void set(int32_t row, int64_t p, double value) {
    const float f = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint16_t h = static_cast<uint16_t>(bits >> 16);
    if (dtype == FLATMTL_F16) {  // truncated: any representable value near enough
      const double size = std::fabs(value);
      int exponent = size > 0 ? std::ilogb(size) : -15;
      exponent = std::max(-14, std::min(15, exponent));
      const int m = size > 0 ? static_cast<int>(std::ldexp(size, 10 - exponent)) : 0;
      h = static_cast<uint16_t>((value < 0 ? 0x8000 : 0) |
                                (m >= 1024 ? ((exponent + 15) << 10 | ((m - 1024) & 1023)) : (m & 1023)));
    }
    switch (dtype) {
      case FLATMTL_F32:
        std::memcpy(at(row, p), &f, 4);
        break;
      case FLATMTL_F64:
        std::memcpy(at(row, p), &value, 8);
        break;
      default:
        std::memcpy(at(row, p), &h, 2);
    }
  }
  void fill(unsigned seed, double scale = 1.0) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (int32_t i = 0; i < num_rows; i++)
      for (int64_t p = 0; p < length(); p++) set(i, p, scale * normal(random));
  }
  // The same values, cut in another way.
  Rows recut(std::vector<int64_t> other) const {
    Rows copy(dtype, num_rows, std::move(other));
    for (int32_t i = 0; i < num_rows; i++)
      for (int64_t p = 0; p < length(); p++) std::memcpy(copy.at(i, p), at(i, p), size_of(dtype));
    return copy;
  }
  flatmtl_rows rows() const {
    return {dtype, num_rows, static_cast<int64_t>(lengths.size()), lengths.data(), pointers.data()};
  }
  flatmtl_vector vector() const {
    return {dtype, static_cast<int64_t>(lengths.size()), lengths.data(), pointers.data()};
  }

  flatmtl_dtype dtype;
  int32_t num_rows;
  std::vector<int64_t> lengths;
  std::vector<char> bytes;
  std::vector<void *> pointers;
};
