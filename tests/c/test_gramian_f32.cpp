// Gramians of many long rows, which are summed in F32 within blocks: errors, bits, and when F64 takes over.
#include <array>
#include <cmath>

#include "catch.h"
#include "support.h"

extern "C" {
#include "kernels.h"
}

namespace {

enum { LONG = 98304 + 37 };

std::vector<double> gramian(const Rows &rows, int threads = 1, flatmtl_accumulate accumulate = FLATMTL_ACCUMULATE_AUTO,
                            flatmtl_status expected = FLATMTL_OK) {
  Context context(rows.num_rows, threads);
  context.value.accumulate = accumulate;
  const auto r = rows.rows();
  std::vector<double> result(static_cast<size_t>(rows.num_rows) * rows.num_rows);
  REQUIRE(flatmtl_gramian(context, &r, result.data(), nullptr) == expected);
  return result;
}

// max |a_ij - b_ij| / sqrt(b_ii b_jj)
double distance(const std::vector<double> &a, const std::vector<double> &b, int32_t n) {
  double worst = 0.0;
  for (int32_t i = 0; i < n; i++)
    for (int32_t j = 0; j < n; j++)
      worst = std::max(worst, std::fabs(a[i * n + j] - b[i * n + j]) / std::sqrt(b[i * (n + 1)] * b[j * (n + 1)]));
  return worst;
}

void scale_row(Rows &rows, int32_t row, double factor) {
  for (int64_t p = 0; p < rows.length(); p++) rows.set(row, p, rows.get(row, p) * factor);
}

}  // namespace

TEST_CASE(
    "Random rows: F32 within blocks is within 1e-8 (half precision: 1e-7), F64 within 1e-13, of sums in long double") {
  for (auto dtype : {FLATMTL_F32, FLATMTL_BF16, FLATMTL_F16}) {
    const int32_t k = 7;
    Rows rows(dtype, k, {LONG});
    rows.fill(1);
    std::vector<double> exact(k * k);
    for (int32_t i = 0; i < k; i++)
      for (int32_t j = 0; j <= i; j++) {
        long double sum = 0;
        for (int64_t p = 0; p < LONG; p++) sum += static_cast<long double>(rows.get(i, p)) * rows.get(j, p);
        exact[i * k + j] = exact[j * k + i] = static_cast<double>(sum);
      }
    const auto fast = gramian(rows), slow = gramian(rows, 1, FLATMTL_ACCUMULATE_F64);
    CAPTURE(static_cast<int>(dtype));
    REQUIRE(distance(fast, exact, k) <= (dtype == FLATMTL_F32 ? 1e-8 : 1e-7));
    REQUIRE(distance(fast, exact, k) > 1e-13);  // it is F32
    REQUIRE(distance(slow, exact, k) <= 1e-13);
  }
}

TEST_CASE("The worst rows stay within the stated bound") {
  const int32_t k = 6;
  Rows rows(FLATMTL_F32, k, {LONG});
  // Equal terms whose sums in F32 are rounded the same way every time; and terms that grow.
  for (int64_t p = 0; p < LONG; p++) {
    rows.set(0, p, 1.0 + 0x1p-12);
    rows.set(1, p, 1.0 + 0x1p-23);
    rows.set(2, p, std::ldexp(1.0, static_cast<int>(p / 16 % 32)));
    rows.set(3, p, p / 16 % 32 == 0 ? 4096.0 : 1.0);
    rows.set(4, p, p % 2 ? -1.0 : 1.0 + 0x1p-20);
    rows.set(5, p, 1.7);
  }
  std::mt19937_64 random(10);  // signs do not change the squares, but make the rows independent
  for (int32_t i = 0; i < k; i++)
    for (int64_t p = 0; p < LONG; p++)
      if (random() % 2) rows.set(i, p, -rows.get(i, p));
  const auto fast = gramian(rows), slow = gramian(rows, 1, FLATMTL_ACCUMULATE_F64);
  REQUIRE(distance(fast, slow, k) <= 3e-6);
  REQUIRE(distance(fast, slow, k) > 1e-8);
}

TEST_CASE("A fused multiply-add is rounded once, also where F64 would round it to a tie between two F32") {
  // In a lane: 1 (1 + u) first, u = 2^-23, then 2^-24 (1 + u) (1 - u). The exact sum lies 2^-70 below the middle
  // between two F32. F64 cannot tell it from the middle, whose even neighbour is 1 + 2 u.
  const std::string before = flatmtl_isa();
  const int32_t k = 6;
  const int64_t block = 512, n = 256 * block;
  const double u = 0x1p-23;
  Rows rows(FLATMTL_F32, k, {n});
  rows.fill(4);
  for (int32_t i = 0; i < 2; i++)
    for (int64_t p = 0; p < n; p++) rows.set(i, p, 0.0);
  for (int64_t p = 0; p < n; p += block)
    for (int64_t l = 0; l < 16; l++) {
      rows.set(0, p + l, 1.0);
      rows.set(1, p + l, 1.0 + u);
      rows.set(0, p + 16 + l, 0x1p-12 * (1.0 + u));
      rows.set(1, p + 16 + l, 0x1p-12 * (1.0 - u));
      rows.set(1, p + 32 + l, l % 2 ? 1.0 : -1.0);  // so that the two rows are independent
    }
  for (const auto &isa : instruction_sets()) {
    REQUIRE(flatmtl_select_isa(isa.c_str(), nullptr) == FLATMTL_OK);
    CAPTURE(isa);
    REQUIRE(gramian(rows)[1] == static_cast<double>(n / block) * 16.0 * (1.0 + u));
  }
  flatmtl_select_isa(before.c_str(), nullptr);
}

TEST_CASE("Bits of F32 sums do not depend on the instruction set, the threads or the segments", "[longest]") {
  const std::string before = flatmtl_isa();
  const int64_t n = LONG;
  std::vector<int64_t> small;
  for (int64_t left = n, t = 0; left > 0; left -= small.back(), t++)
    small.push_back(std::min<int64_t>(left, (37 * t) % 500));
  const std::vector<std::vector<int64_t>> cuts = {{n}, {3, n - 1003, 1000}, small, {n / 2 + 9, 0, n - n / 2 - 9}};
  for (auto dtype : {FLATMTL_F32, FLATMTL_BF16, FLATMTL_F16})
    for (int32_t k : {4, 6, 10, 17, 35}) {
      if (k > 10 && dtype != FLATMTL_F32) continue;
      Rows g(dtype, k, {n}), s(dtype, k, {n});
      g.fill(2);
      s.fill(3, 1e-3);
      std::vector<double> first;
      for (const auto &isa : instruction_sets())
        for (size_t way = 0; way < 4; way++) {
          if (isa == "base" && k > 10 && way != 2) continue;  // slow
          REQUIRE(flatmtl_select_isa(isa.c_str(), nullptr) == FLATMTL_OK);
          const Rows gc = g.recut(cuts[way]), sc = s.recut(cuts[way]);
          Context context(k, std::array<int, 4>{{1, 2, 3, 7}}[way]);
          const auto gr = gc.rows(), sr = sc.rows();
          std::vector<double> result(9 * k * k);
          REQUIRE(flatmtl_gramian(context, &gr, result.data(), nullptr) == FLATMTL_OK);
          if (k < 35) REQUIRE(flatmtl_gramian_pair(context, &gr, &sr, 1, result.data() + k * k, nullptr) == FLATMTL_OK);
          REQUIRE(flatmtl_gramian_pair(context, &gr, &sr, 0, result.data() + 5 * k * k, nullptr) == FLATMTL_OK);
          if (first.empty()) first = result;
          CAPTURE(isa, way, k, static_cast<int>(dtype));
          REQUIRE(std::memcmp(first.data(), result.data(), result.size() * sizeof(double)) == 0);
        }
    }
  flatmtl_select_isa(before.c_str(), nullptr);
}

TEST_CASE("Rows of BF16 give the bits of the same numbers in F32, widened before or as they are multiplied") {
  const std::string before = flatmtl_isa();
  for (int32_t k : {1, 4, 5, 17, 33})
    for (const auto &cut : std::vector<std::vector<int64_t>>{{LONG}, {5, 90000, 0, 33, LONG - 90038}}) {
      Rows g(FLATMTL_BF16, k, cut), s(FLATMTL_BF16, k, cut), wide_g(FLATMTL_F32, k, cut), wide_s(FLATMTL_F32, k, cut);
      g.fill(2);
      s.fill(3);
      for (int32_t i = 0; i < k; i++)
        for (int64_t p = 0; p < LONG; p++) {
          wide_g.set(i, p, g.get(i, p));
          wide_s.set(i, p, s.get(i, p));
        }
      for (const auto &isa : instruction_sets()) {
        REQUIRE(flatmtl_select_isa(isa.c_str(), nullptr) == FLATMTL_OK);
        CAPTURE(isa, k, cut.size());
        const auto results = [&](const Rows &first, const Rows &second) {
          Context context(k, 2);
          const auto gr = first.rows(), sr = second.rows();
          std::vector<double> result(9 * k * k);
          REQUIRE(flatmtl_gramian(context, &gr, result.data(), nullptr) == FLATMTL_OK);
          for (int32_t cross : {0, 1})
            REQUIRE(flatmtl_gramian_pair(context, &gr, &sr, cross, result.data() + (1 + 4 * cross) * k * k, nullptr) ==
                    FLATMTL_OK);
          return result;
        };
        REQUIRE(results(g, s) == results(wide_g, wide_s));
      }
    }
  flatmtl_select_isa(before.c_str(), nullptr);
}

TEST_CASE("The emulated fused multiply-add of the base kernels is fmaf") {
  // One lane, one element a run: the sum of a single product; two elements: a true fused addition.
  std::mt19937_64 random(4);
  std::vector<float> x(512), y(512);
  auto any = [&](int range) {
    const double m = 1.0 + static_cast<double>(random() % (1u << 23)) * 0x1p-23;
    return static_cast<float>(std::ldexp(random() % 2 ? m : -m, static_cast<int>(random() % (2 * range)) - range));
  };
  int different = 0;
  for (int round = 0; round < 20000; round++) {
    const int range = round % 3 == 0 ? 60 : round % 3 == 1 ? 12 : 3;
    std::fill(x.begin(), x.end(), 0.0f);
    std::fill(y.begin(), y.end(), 0.0f);
    const int chain = 1 + static_cast<int>(random() % 4);
    float expected = 0.0f, rounded = 0.0f;
    for (int step = 0; step < chain; step++) {
      x[16 * step] = any(range);
      y[16 * step] = round % 5 ? any(range) : std::nextafter(x[16 * step], 0.0f);
      expected = std::fma(x[16 * step], y[16 * step], expected);
      rounded += x[16 * step] * y[16 * step];
    }
    different += rounded != expected;
    const std::array<const float *, 4> rows = {{y.data(), y.data(), y.data(), y.data()}};
    const float *row = x.data();
    std::array<double, 4> sums{};
    double *out = sums.data();
    const fm_ahead none{};
    fm_kernels_base->gram_fast(&row, 1, rows.data(), 4, 512, 1, 1, nullptr, &out, &none);
    REQUIRE(sums[0] == static_cast<double>(expected));
  }
  REQUIRE(different > 1000);  // so that a multiplication and an addition would have failed
}

TEST_CASE("Where F32 over- or underflows, F64 takes over") {
  const int32_t k = 6;
  Rows rows(FLATMTL_F32, k, {LONG});
  rows.fill(5);
  const auto f64 = [&] { return gramian(rows, 1, FLATMTL_ACCUMULATE_F64); };
  REQUIRE(gramian(rows) != f64());
  SECTION("a row too large for its squares") {
    scale_row(rows, 2, 1e25);
    REQUIRE(gramian(rows) == f64());
  }
  SECTION("rows that are small, too small for their squares, or subnormal") {
    for (double factor : {1e-15, 1e-20, 1e-40}) {
      rows.fill(5);
      scale_row(rows, 4, factor);
      REQUIRE(gramian(rows) == f64());
      REQUIRE(gramian(rows)[4 * (k + 1)] > 0.0);
    }
  }
  SECTION("a row of one small number") {
    for (int64_t p = 0; p < LONG; p++) rows.set(1, p, p == 98000 ? 1e-30 : 0.0);
    const auto result = gramian(rows, 3);
    REQUIRE(result == f64());
    REQUIRE(result[k + 1] > 0.0);
  }
  SECTION("but a row of zeros is no reason") {
    for (int64_t p = 0; p < LONG; p++) rows.set(3, p, p % 3 ? 0.0 : -0.0);
    const auto result = gramian(rows, 2);
    for (int32_t i = 0; i < k; i++) REQUIRE(result[3 * k + i] == 0.0);
    REQUIRE(result != f64());
  }
}

TEST_CASE("Inf and NaN in long rows are reported, and other rows keep their values") {
  for (auto dtype : {FLATMTL_F32, FLATMTL_BF16})
    for (double bad : {static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
      const int32_t k = 8;
      Rows g(dtype, k, {1000, LONG}), s(dtype, k, {1000, LONG});
      g.fill(6);
      s.fill(7);
      const uint16_t half = std::isnan(bad) ? 0x7fc0 : 0x7f80;
      if (dtype == FLATMTL_BF16)
        std::memcpy(s.at(5, 98001), &half, 2);
      else
        s.set(5, 98001, bad);
      const auto gr = g.rows(), sr = s.rows();
      Context context(k, 2);
      std::vector<double> result(4 * k * k);
      flatmtl_error error{};
      REQUIRE(flatmtl_gramian(context, &sr, result.data(), &error) == FLATMTL_ERROR_NONFINITE);
      REQUIRE(error.row == 5);
      REQUIRE(std::isfinite(result[4 * (k + 1)]));
      REQUIRE(flatmtl_gramian_pair(context, &gr, &sr, 1, result.data(), &error) == FLATMTL_ERROR_NONFINITE);
      REQUIRE(error.row == k + 5);
    }
}

TEST_CASE("Nearly dependent rows are summed in F64, which keeps the Gramian positive semidefinite") {
  const int32_t k = 9;
  Rows rows(FLATMTL_F32, k, {LONG});
  rows.fill(8);
  const auto f64 = [&] { return gramian(rows, 1, FLATMTL_ACCUMULATE_F64); };
  SECTION("equal and opposite rows") {
    for (int64_t p = 0; p < LONG; p++) {
      rows.set(7, p, rows.get(1, p));
      rows.set(8, p, -rows.get(1, p));
    }
    REQUIRE(gramian(rows) == f64());
  }
  SECTION("a sum of other rows, and a little") {
    for (int64_t p = 0; p < LONG; p++) rows.set(8, p, rows.get(1, p) - 2.0 * rows.get(5, p) + 1e-3 * rows.get(8, p));
    REQUIRE(gramian(rows) == f64());
  }
  SECTION("but not rows at small angles") {
    for (int64_t p = 0; p < LONG; p++) rows.set(8, p, rows.get(1, p) + 1e-2 * rows.get(8, p));
    const auto g = gramian(rows);
    REQUIRE(g != f64());
    REQUIRE(distance(g, f64(), k) <= 1e-8);
  }
}

TEST_CASE("A pair without cross products has both families' Gramians") {
  const int32_t k = 40;
  Rows g(FLATMTL_F32, k, {LONG}), s(FLATMTL_F32, k, {LONG}), flat(FLATMTL_F32, k, {LONG});
  g.fill(2);
  s.fill(3, 1e-3);
  for (int32_t i = 0; i < k; i++)
    for (int64_t p = 0; p < LONG; p++)
      flat.set(i, p, static_cast<float>(s.get(i, p)) - static_cast<float>(g.get(i, p)));
  const auto families = [&](int32_t n) {
    Context context(n, 2);
    const auto gr = g.rows(), sr = s.rows();
    const flatmtl_rows first = {gr.dtype, n, 1, gr.lengths, gr.data}, other = {sr.dtype, n, 1, sr.lengths, sr.data};
    std::vector<double> pair(4 * n * n), parts[2];
    REQUIRE(flatmtl_gramian_pair(context, &first, &other, 0, pair.data(), nullptr) == FLATMTL_OK);
    for (int32_t i = 0; i < 2 * n; i++)
      for (int32_t j = 0; j < 2 * n; j++)
        if ((i < n) == (j < n))
          parts[i < n ? 0 : 1].push_back(pair[i * 2 * n + j]);
        else
          REQUIRE(pair[i * 2 * n + j] == 0.0);
    return std::vector<std::vector<double>>{parts[0], parts[1]};
  };
  const auto exact = [&](const Rows &rows, int32_t n) {
    const auto all = gramian(rows, 2, FLATMTL_ACCUMULATE_F64);
    std::vector<double> part;
    for (int32_t i = 0; i < n; i++) part.insert(part.end(), &all[i * k], &all[i * k] + n);
    return part;
  };
  SECTION("within the bounds of F32, whatever the number of panels") {
    for (int32_t n : {4, 16, 17, 33, 40}) {
      const auto parts = families(n);
      CAPTURE(n);
      REQUIRE(distance(parts[0], exact(g, n), n) <= 1e-8);
      REQUIRE(distance(parts[1], exact(flat, n), n) <= 1e-8);
      REQUIRE(distance(parts[1], exact(flat, n), n) > 1e-13);  // it is F32
    }
  }
  SECTION("in the workspace that is asked for, of few rows in as many chunks as there can be") {
    const int64_t n = 64 * 4096 + 5;
    for (int32_t rows : {1, 2}) {
      Rows x(FLATMTL_F32, rows, {n}), y(FLATMTL_F32, rows, {n});
      x.fill(4);
      y.fill(5);
      const auto xr = x.rows(), yr = y.rows();
      Context context(rows, 2);
      std::vector<double> pair(4 * rows * rows);
      REQUIRE(flatmtl_gramian_pair(context, &xr, &yr, 0, pair.data(), nullptr) == FLATMTL_OK);
      const auto whole = gramian(x, 2);
      for (int32_t i = 0; i < rows; i++) REQUIRE(pair[i] == whole[i]);
    }
  }
  SECTION("F64 takes over where the rows of one of them are nearly dependent") {
    for (int64_t p = 0; p < LONG; p++) {  // f_4 = f_1, in numbers that F32 has
      g.set(4, p, static_cast<double>(p % 101));
      g.set(1, p, static_cast<double>(p % 103));
      for (int32_t i : {1, 4}) s.set(i, p, g.get(i, p) + static_cast<double>(p % 7));
      for (int32_t i : {1, 4}) flat.set(i, p, static_cast<double>(p % 7));
    }
    const auto parts = families(6);
    REQUIRE(distance(parts[1], exact(flat, 6), 6) <= 1e-13);
    REQUIRE(parts[1][4 * 6 + 1] == parts[1][1 * 6 + 1]);
  }
}

TEST_CASE("accumulate must be known") {
  Rows rows(FLATMTL_F32, 2, {8});
  rows.fill(9);
  const auto r = rows.rows();
  Context context(2);
  context.value.accumulate = static_cast<flatmtl_accumulate>(7);
  double result[4];
  flatmtl_error error{};
  REQUIRE(flatmtl_gramian(context, &r, result, &error) == FLATMTL_ERROR_NAME);
  REQUIRE(std::string(error.argument) == "accumulate");
}
