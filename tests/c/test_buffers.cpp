// Buffer methods: equal bits on every instruction set, number of threads and cut into segments; refusals; the one call
// against its pieces. The formulas are held against the reference in tests/python/test_buffers.py.
#include <cmath>
#include <string>
#include <vector>

#include "catch.h"
#include "support.h"

namespace {

flatmtl_buffers buffers_of(const Rows &rows) {
  return {rows.dtype, rows.num_rows, static_cast<int64_t>(rows.lengths.size()), rows.lengths.data(),
          rows.pointers.data()};
}

std::vector<double> values_of(const Rows &rows) {
  std::vector<double> found;
  for (int32_t i = 0; i < rows.num_rows; i++)
    for (int64_t p = 0; p < rows.length(); p++) found.push_back(rows.get(i, p));
  return found;
}

flatmtl_dtype wide(flatmtl_dtype dtype) {
  return dtype == FLATMTL_F64 ? FLATMTL_F64 : FLATMTL_F32;
}

// Two steps of a method on given rows, flat rows too: everything that comes out.
std::vector<double> run(int method, const Rows &g, const Rows &s, int threads) {
  const int32_t k = g.num_rows;
  Context context(k, threads);
  Rows memory(wide(g.dtype), k, g.lengths), out(g.dtype, 1, g.lengths);
  memory.fill(0, 0.0);
  std::vector<double> losses, state(static_cast<size_t>(3 * k), 0.0), weights(static_cast<size_t>(k)), found;
  for (int32_t i = 0; i < k; i++) losses.push_back(1.0 + i);
  int64_t count = 0;
  REQUIRE(flatmtl_buffer_state_size(static_cast<flatmtl_buffer_method>(method), k, &count, nullptr, nullptr) ==
          FLATMTL_OK);
  const flatmtl_rows loss = g.rows(), perturbed = s.rows();
  const flatmtl_mixed_rows rows = {&loss, &perturbed, nullptr, nullptr};
  const flatmtl_buffers buffers = buffers_of(memory);
  const flatmtl_vector target = out.vector();
  for (int step = 0; step < 2; step++) {
    flatmtl_error error{};
    REQUIRE(flatmtl_buffer_update(context, static_cast<flatmtl_buffer_method>(method), nullptr, 0, &rows, losses.data(),
                                  1, method ? &buffers : nullptr, count ? state.data() : nullptr, weights.data(),
                                  &target, &error) == FLATMTL_OK);
    for (double value : values_of(out)) found.push_back(value);
    for (double value : weights) found.push_back(std::isnan(value) ? -1.0 : value);
  }
  for (double value : values_of(memory)) found.push_back(value);
  for (double value : state) found.push_back(value);
  std::vector<double> cross(static_cast<size_t>(k) * static_cast<size_t>(k));
  REQUIRE(flatmtl_cross_gramian(context, &rows, &rows, cross.data(), nullptr) == FLATMTL_OK);
  for (double value : cross) found.push_back(value);
  return found;
}

}  // namespace

TEST_CASE("buffer methods give the same bits on every instruction set, thread count and cut") {
  const std::string before = flatmtl_isa();
  for (auto dtype : {FLATMTL_F32, FLATMTL_F64, FLATMTL_BF16, FLATMTL_F16}) {
    const int64_t length = 70001;
    Rows g(dtype, 3, {length}), s(dtype, 3, {length});
    g.fill(1);
    s.fill(2);
    const Rows g_cut = g.recut({5, 0, 511, 1, 30000, length - 30517}), s_cut = s.recut(g_cut.lengths);
    for (int method = 0; method < FLATMTL_BUFFER_SDMGRAD; method++) {
      std::vector<double> expected;
      for (const auto &isa : instruction_sets()) {
        REQUIRE(flatmtl_select_isa(isa.c_str(), nullptr) == FLATMTL_OK);
        for (int threads : {1, 3}) {
          const auto found = run(method, g, s, threads);
          if (expected.empty()) expected = found;
          REQUIRE((found == expected));
          REQUIRE((run(method, g_cut, s_cut, threads) == expected));
        }
      }
    }
  }
  flatmtl_select_isa(before.c_str(), nullptr);
}

TEST_CASE("a part of graddrop's vector draws what the whole draws there") {
  Rows g(FLATMTL_F64, 2, {600, 400}), out(FLATMTL_F64, 1, {600, 400}), second(FLATMTL_F64, 2, {400}),
      part(FLATMTL_F64, 1, {400});
  g.fill(3);
  for (int32_t i = 0; i < 2; i++)
    for (int64_t p = 0; p < 400; p++) second.set(i, p, g.get(i, 600 + p));
  Context context(2);
  const flatmtl_rows all = g.rows(), tail = second.rows();
  const flatmtl_mixed_rows whole = {&all, nullptr, nullptr, nullptr}, rest = {&tail, nullptr, nullptr, nullptr};
  const flatmtl_vector target = out.vector(), part_target = part.vector();
  REQUIRE(flatmtl_graddrop(context, &whole, nullptr, 1, 2, 3, 0, &target, nullptr) == FLATMTL_OK);
  REQUIRE(flatmtl_graddrop(context, &rest, nullptr, 1, 2, 3, 600, &part_target, nullptr) == FLATMTL_OK);
  int mixed = 0;
  for (int64_t p = 0; p < 400; p++) {
    REQUIRE(part.get(0, p) == out.get(0, 600 + p));
    const double a = second.get(0, p), b = second.get(1, p), kept = part.get(0, p);
    if (a * b > 0) REQUIRE(kept == a + b);
    if (a * b < 0) REQUIRE((kept == a || kept == b));
    mixed += a * b < 0 && kept == a;
  }
  REQUIRE(mixed > 40);
  REQUIRE(mixed < 160);
}

TEST_CASE("buffer methods: names, defaults, refusals") {
  const char *const names[] = {"graddrop", "moco", "db_mtl", "excess_mtl", "sdmgrad"};
  for (int i = 0; i < FLATMTL_NUM_BUFFER_METHODS; i++) {
    flatmtl_buffer_method method;
    REQUIRE(flatmtl_buffer_method_by_name(names[i], &method, nullptr) == FLATMTL_OK);
    REQUIRE(method == i);
    REQUIRE(std::string(flatmtl_buffer_method_name(method)) == names[i]);
    double options[8];
    int32_t count = 8, has = -1;
    REQUIRE(flatmtl_buffer_method_defaults(method, 2, options, &count, nullptr) == FLATMTL_OK);
    REQUIRE(flatmtl_buffer_state_size(method, 2, nullptr, &has, nullptr) == FLATMTL_OK);
    REQUIRE(has == (i >= 1 && i <= 3));
    std::vector<double> losses(2, 1.0), squares(2, 1.0), state(6, 0.0), factors(2), keep(2);
    for (int32_t j = 0; j < count; j++) {
      const double old = options[j];
      options[j] = -1.0;
      REQUIRE(flatmtl_buffer_factors(method, options, count, 2, losses.data(), squares.data(), state.data(),
                                     factors.data(), keep.data(), nullptr) == FLATMTL_ERROR_OPTION);
      options[j] = old;
    }
    REQUIRE(flatmtl_buffer_factors(method, options, count, 2, losses.data(), squares.data(), state.data(),
                                   factors.data(), keep.data(), nullptr) == FLATMTL_OK);
  }
  REQUIRE(flatmtl_buffer_method_name(FLATMTL_NUM_BUFFER_METHODS) == nullptr);

  Rows g(FLATMTL_F32, 2, {64}), memory(FLATMTL_F32, 2, {64}), out(FLATMTL_F32, 1, {64});
  g.fill(1);
  memory.fill(0, 0.0);
  Context context(2);
  std::vector<double> losses = {1.0, -1.0}, state(4, 0.0);
  const flatmtl_buffers buffers = buffers_of(memory);
  const flatmtl_vector target = out.vector();
  const auto update = [&](const flatmtl_rows &rows, const flatmtl_buffers *where, flatmtl_error *error) {
    const flatmtl_mixed_rows mixed = {&rows, nullptr, nullptr, nullptr};
    return flatmtl_buffer_update(context, FLATMTL_BUFFER_MOCO, nullptr, 0, &mixed, losses.data(), 0, where,
                                 state.data(), nullptr, &target, error);
  };
  flatmtl_error error{};
  REQUIRE(update(g.rows(), &buffers, &error) == FLATMTL_ERROR_LOSS);
  REQUIRE(error.row == 1);
  losses[1] = 1.0;
  REQUIRE(update(g.rows(), nullptr, &error) == FLATMTL_ERROR_NULL);
  const flatmtl_buffers same = buffers_of(g);
  REQUIRE(update(g.rows(), &same, &error) == FLATMTL_ERROR_OVERLAP);
  flatmtl_buffers narrow = buffers;
  narrow.dtype = FLATMTL_BF16;
  REQUIRE(update(g.rows(), &narrow, &error) == FLATMTL_ERROR_DTYPE);
  g.set(1, 7, INFINITY);
  REQUIRE(update(g.rows(), &buffers, &error) == FLATMTL_ERROR_NONFINITE);
  REQUIRE(error.row == 1);
  for (double value : values_of(memory)) REQUIRE(value == 0.0);
  for (double value : state) REQUIRE(value == 0.0);
}
