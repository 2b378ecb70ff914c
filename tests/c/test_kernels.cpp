// The passes over memory, against sums in long double, and bit for bit against themselves.
#include <algorithm>
#include <array>
#include <cmath>

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#include "catch.h"
#include "support.h"

namespace {

const std::vector<flatmtl_dtype> dtypes = {FLATMTL_F32, FLATMTL_F64, FLATMTL_BF16, FLATMTL_F16};

double rounded_difference(const Rows &g, const Rows &s, int32_t i, int64_t p) {
  const double exact = s.get(i, p) - g.get(i, p);
  return g.dtype == FLATMTL_F64
             ? exact
             : static_cast<double>(static_cast<float>(s.get(i, p)) - static_cast<float>(g.get(i, p)));
}

// weight x, rounded to the dtype of x, for numbers of 16 bits.
std::vector<uint16_t> scaled(flatmtl_dtype dtype, const std::vector<uint16_t> &x, double weight) {
  std::vector<uint16_t> out(x.size());
  const int64_t n = static_cast<int64_t>(x.size());
  const void *data[] = {x.data()};
  void *target[] = {out.data()};
  const flatmtl_rows rows = {dtype, 1, 1, &n, data};
  const flatmtl_vector vector = {dtype, 1, &n, target};
  Context context(1);
  REQUIRE(flatmtl_combine(context, &rows, &weight, &vector, nullptr) == FLATMTL_OK);
  return out;
}

std::vector<std::vector<int64_t>> cuts(int64_t n) {
  return {{n}, {0, 1, n - 1, 0}, {n / 3, n - n / 3 - n / 5, n / 5}, {7, 511, 513, n - 1031}};
}

}  // namespace

TEST_CASE("Gramians and norms agree with sums in long double") {
  for (auto dtype : dtypes)
    for (int32_t k : {1, 2, 3, 5, 9, 17}) {
      Rows g(dtype, k, {1500, 0, 13}), s(dtype, k, {1500, 0, 13}), theta(dtype, 1, {1500, 0, 13});
      g.fill(1);
      s.fill(2, 0.5);
      theta.fill(3);
      const auto gr = g.rows(), sr = s.rows(), tr = theta.rows();
      Context context(k);
      const int32_t n = 2 * k;
      std::vector<double> pair(n * n), families(n * n, 1.0), single(k * k), norms(k), scaled(k);
      REQUIRE(flatmtl_gramian_pair(context, &gr, &sr, 1, pair.data(), nullptr) == FLATMTL_OK);
      REQUIRE(flatmtl_gramian_pair(context, &gr, &sr, 0, families.data(), nullptr) == FLATMTL_OK);
      REQUIRE(flatmtl_gramian(context, &gr, single.data(), nullptr) == FLATMTL_OK);
      REQUIRE(flatmtl_sq_norms(context, &gr, nullptr, 0.0, norms.data(), nullptr) == FLATMTL_OK);
      REQUIRE(flatmtl_sq_norms(context, &gr, &tr, 0.25, scaled.data(), nullptr) == FLATMTL_OK);
      auto value = [&](int32_t i, int64_t p) {
        return static_cast<long double>(i < k ? g.get(i, p) : rounded_difference(g, s, i - k, p));
      };
      for (int32_t i = 0; i < n; i++)
        for (int32_t j = 0; j < n; j++) {
          long double sum = 0, size = 0;
          for (int64_t p = 0; p < g.length(); p++) {
            sum += value(i, p) * value(j, p);
            size += std::fabs(value(i, p) * value(j, p));
          }
          REQUIRE(std::fabs(static_cast<double>(sum) - pair[i * n + j]) <= 1e-14 * static_cast<double>(size));
          REQUIRE(families[i * n + j] == ((i < k) == (j < k) ? pair[i * n + j] : 0.0));
          if (i < k && j < k) REQUIRE(single[i * k + j] == pair[i * n + j]);  // short rows: both are summed in F64
        }
      for (int32_t i = 0; i < k; i++) {
        long double plain = 0, with_t = 0;
        for (int64_t p = 0; p < g.length(); p++) {
          plain += value(i, p) * value(i, p);
          with_t += std::pow((std::fabs(static_cast<long double>(theta.get(0, p))) + 0.25L) * value(i, p), 2);
        }
        REQUIRE(norms[i] == Approx(static_cast<double>(plain)).epsilon(1e-13));
        REQUIRE(scaled[i] == Approx(static_cast<double>(with_t)).epsilon(1e-13));
      }
    }
}

TEST_CASE("Combination, perturbation and copy agree with their definitions") {
  for (auto dtype : dtypes) {
    const std::vector<int64_t> lengths = {700, 0, 5, 1200};
    Rows g(dtype, 3, lengths), s(dtype, 3, lengths), out(dtype, 1, lengths), saved(dtype, 1, lengths);
    g.fill(4);
    s.fill(5);
    saved.fill(6);
    const auto gr = g.rows(), sr = s.rows(), saved_row = saved.rows();
    const auto target = out.vector();
    const std::vector<double> a = {0.3, -1.7, 2.5}, b = {10.0, 0.0, -0.01}, scale = {0.1, 9.0, -0.5, 0.02};
    Context context(3);
    const double unit = dtype == FLATMTL_F64   ? 2.3e-16
                        : dtype == FLATMTL_F32 ? 6e-8
                        : dtype == FLATMTL_F16 ? 4.9e-4
                                               : 4e-3;
    double worst = 0.0;
    REQUIRE(flatmtl_combine_pair(context, &gr, &sr, a.data(), b.data(), &target, nullptr) == FLATMTL_OK);
    for (int64_t p = 0; p < g.length(); p++) {
      double sum = 0.0;
      for (int32_t i = 0; i < 3; i++) sum = (sum + a[i] * g.get(i, p)) + b[i] * (s.get(i, p) - g.get(i, p));
      worst = std::max(worst, std::fabs(out.get(0, p) - sum) - unit * std::fabs(sum));
    }
    REQUIRE(flatmtl_combine(context, &gr, a.data(), &target, nullptr) == FLATMTL_OK);
    for (int64_t p = 0; p < g.length(); p++) {
      double sum = 0.0;
      for (int32_t i = 0; i < 3; i++) sum += a[i] * g.get(i, p);
      worst = std::max(worst, std::fabs(out.get(0, p) - sum) - unit * std::fabs(sum));
    }
    const Rows direction = g;
    const flatmtl_rows gradient = {dtype, 1, 4, g.lengths.data(), g.pointers.data()};
    for (int adaptive : {0, 1}) {
      REQUIRE(flatmtl_perturb(context, &target, &saved_row, &gradient, scale.data(), adaptive, 0.5, nullptr) ==
              FLATMTL_OK);
      for (int64_t p = 0; p < g.length(); p++) {
        const double t = adaptive ? std::fabs(saved.get(0, p)) + 0.5 : 1.0;
        const double moved = saved.get(0, p) + scale[p < 700 ? 0 : p < 705 ? 2 : 3] * (t * t) * g.get(0, p);
        worst = std::max(worst, std::fabs(out.get(0, p) - moved) - unit * std::fabs(moved));
      }
    }
    REQUIRE(worst <= 3.1e-8);
    REQUIRE(flatmtl_copy(context, &target, &saved_row, nullptr) == FLATMTL_OK);
    REQUIRE(out.recut(out.lengths).bytes == saved.recut(saved.lengths).bytes);
    REQUIRE(g.bytes == direction.bytes);
  }
}

TEST_CASE("Bits do not depend on the instruction set, the threads or the segments") {
  const int64_t n = 40001;  // three chunks
  const std::string before = flatmtl_isa();
  for (auto dtype : dtypes)
    for (int32_t k : {1, 4, 11}) {
      Rows g(dtype, k, {n}), s(dtype, k, {n}), theta(dtype, 1, {n});
      g.fill(7);
      s.fill(8);
      theta.fill(9);
      std::vector<double> a(k, 0.1), b(k, -0.7), first;
      std::vector<char> first_out;
      for (const auto &isa : instruction_sets())
        for (size_t way = 0; way < 4; way++) {
          const int threads = std::array<int, 4>{{1, 2, 3, 7}}[way];
          const auto cut = cuts(n)[way];
          REQUIRE(flatmtl_select_isa(isa.c_str(), nullptr) == FLATMTL_OK);
          Context context(k, threads);
          const Rows gc = g.recut(cut), sc = s.recut(cut), tc = theta.recut(cut);
          Rows combined(dtype, 1, cut), moved(dtype, 1, cut);
          const auto gr = gc.rows(), sr = sc.rows(), tr = tc.rows();
          const auto c = combined.vector(), m = moved.vector();
          std::vector<double> results(8 * k * k + 2 * k), scale(cut.size(), 0.01);
          REQUIRE(flatmtl_gramian_pair(context, &gr, &sr, 1, results.data(), nullptr) == FLATMTL_OK);
          REQUIRE(flatmtl_gramian_pair(context, &gr, &sr, 0, &results[4 * k * k + 2 * k], nullptr) == FLATMTL_OK);
          REQUIRE(flatmtl_sq_norms(context, &gr, nullptr, 0.0, &results[4 * k * k], nullptr) == FLATMTL_OK);
          REQUIRE(flatmtl_sq_norms(context, &gr, &tr, 0.1, &results[4 * k * k + k], nullptr) == FLATMTL_OK);
          REQUIRE(flatmtl_combine_pair(context, &gr, &sr, a.data(), b.data(), &c, nullptr) == FLATMTL_OK);
          const flatmtl_rows row = {dtype, 1, gr.num_segments, gr.lengths, gr.data};
          REQUIRE(flatmtl_perturb(context, &m, &tr, &row, scale.data(), 1, 0.1, nullptr) == FLATMTL_OK);
          std::vector<char> out = combined.recut({n}).bytes;
          const std::vector<char> more = moved.recut({n}).bytes;
          out.insert(out.end(), more.begin(), more.end());
          if (first.empty()) {
            first = results;
            first_out = out;
          }
          CAPTURE(isa, threads, cut.size(), k, static_cast<int>(dtype));
          REQUIRE(std::memcmp(first.data(), results.data(), first.size() * sizeof(double)) == 0);
          REQUIRE(first_out == out);
        }
    }
  flatmtl_select_isa(before.c_str(), nullptr);
}

TEST_CASE("Every half precision number widens exactly and rounds to the nearest, ties to even") {
  const std::string before = flatmtl_isa();
  for (const auto &isa : instruction_sets()) {
    flatmtl_select_isa(isa.c_str(), nullptr);
    for (auto dtype : {FLATMTL_F16, FLATMTL_BF16}) {
      auto value = dtype == FLATMTL_F16 ? half_value : bf16_value;
      const uint16_t infinity = dtype == FLATMTL_F16 ? 0x7c00 : 0x7f80;
      std::vector<uint16_t> all;
      for (uint32_t h = 0; h < infinity; h++) all.push_back(static_cast<uint16_t>(h));
      REQUIRE(scaled(dtype, all, 1.0) == all);
      // w x for w slightly off a power of two lands between neighbours everywhere
      for (double w : {1.0 + 0x1p-9, 1.0 + 0x1p-12, 1.0 + 0x1p-11 + 0x1p-40, 0.7, 1.0 + 0x1p-8, 1.0 + 0x1p-8 + 0x1p-40,
                       1.0 + 0x1p-8 - 0x1p-40}) {
        const std::vector<uint16_t> out = scaled(dtype, all, w);
        int wrong = 0;
        for (uint32_t h = 0; h + 2 < infinity; h++) {
          const double x = w * value(static_cast<uint16_t>(h));
          const uint16_t got = out[h];
          if (got == infinity) {
            wrong += !(x > value(static_cast<uint16_t>(infinity - 1)));
            continue;
          }
          const double error = std::fabs(value(got) - x);
          const double up = got + 1 < infinity ? value(static_cast<uint16_t>(got + 1)) - x : INFINITY;
          const double down = got > 0 ? x - value(static_cast<uint16_t>(got - 1)) : INFINITY;
          wrong += error > up || error > down || ((error == up || error == down) && got % 2 != 0);
        }
        REQUIRE(wrong == 0);
      }
    }
  }
  flatmtl_select_isa(before.c_str(), nullptr);
}

TEST_CASE("What is too large for half precision becomes Inf of its sign") {
  const std::string before = flatmtl_isa();
  for (const auto &isa : instruction_sets()) {
    flatmtl_select_isa(isa.c_str(), nullptr);
    for (auto dtype : {FLATMTL_F16, FLATMTL_BF16}) {
      const uint16_t infinity = dtype == FLATMTL_F16 ? 0x7c00 : 0x7f80;
      std::vector<uint16_t> x, expected;
      for (int p = 0; p < 67; p++) {  // whole registers and a rest
        const uint16_t sign = p % 2 ? 0x8000 : 0;
        x.push_back(static_cast<uint16_t>((p % 3 ? infinity - 1 : infinity) | sign));
        expected.push_back(static_cast<uint16_t>(infinity | sign));
      }
      for (double w : {1.0 + 0x1p-8, 4.0, 0x1p900}) REQUIRE(scaled(dtype, x, w) == expected);
    }
  }
  flatmtl_select_isa(before.c_str(), nullptr);
}

TEST_CASE("NaN becomes the quiet NaN of its sign") {
  const std::string before = flatmtl_isa();
  for (const auto &isa : instruction_sets()) {
    flatmtl_select_isa(isa.c_str(), nullptr);
    for (auto dtype : {FLATMTL_F16, FLATMTL_BF16}) {
      const uint16_t infinity = dtype == FLATMTL_F16 ? 0x7c00 : 0x7f80, quiet = dtype == FLATMTL_F16 ? 0x7e00 : 0x7fc0;
      std::vector<uint16_t> nans, expected;
      for (uint32_t sign : {0u, 0x8000u})
        for (uint32_t bits = infinity + 1u; bits < 0x8000u; bits++) {
          nans.push_back(static_cast<uint16_t>(bits | sign));
          expected.push_back(static_cast<uint16_t>(quiet | sign));
        }
      REQUIRE(scaled(dtype, nans, 1.0) == expected);
    }
  }
  flatmtl_select_isa(before.c_str(), nullptr);
}

#ifdef __SSE2__
TEST_CASE("Subnormal results in BF16 do not depend on the flushing of subnormal numbers") {
  const std::string before = flatmtl_isa();
  for (const auto &isa : instruction_sets()) {
    flatmtl_select_isa(isa.c_str(), nullptr);
    Rows g(FLATMTL_BF16, 1, {300});
    for (int64_t p = 0; p < 300; p++) g.set(0, p, std::ldexp(1.0 + static_cast<double>(p) / 512.0, -100));
    const auto gr = g.rows();
    Context context(1);
    // 2^-128 and more: below the normal numbers, above the least one, 2^-133
    for (double tiny : {0x1p-28, 0x1p-28 * (1.0 + 0x1p-40), 0x1p-28 * (1.0 - 0x1p-40)})
      for (unsigned int flush : {0x40u, 0x8000u, 0x8040u}) {  // subnormal operands are zeros, results flushed, both
        Rows kept(FLATMTL_BF16, 1, {300}), flushed(FLATMTL_BF16, 1, {300});
        const auto k = kept.vector(), f = flushed.vector();
        REQUIRE(flatmtl_combine(context, &gr, &tiny, &k, nullptr) == FLATMTL_OK);
        const unsigned int mode = _mm_getcsr();
        _mm_setcsr(mode | flush);
        const flatmtl_status status = flatmtl_combine(context, &gr, &tiny, &f, nullptr);
        _mm_setcsr(mode);
        REQUIRE(status == FLATMTL_OK);
        REQUIRE(std::memcmp(kept.at(0, 0), flushed.at(0, 0), 600) == 0);
        uint16_t bits;
        std::memcpy(&bits, kept.at(0, 0), 2);
        REQUIRE(bits == 0x20);  // 2^-128, in units of 2^-133
      }
  }
  flatmtl_select_isa(before.c_str(), nullptr);
}
#endif

TEST_CASE("Non-finite rows are named, and nothing else is disturbed") {
  for (auto dtype : dtypes)
    for (double bad : {static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
      Rows g(dtype, 3, {40}), s(dtype, 3, {40});
      g.fill(10);
      s.fill(11);
      const uint16_t half = static_cast<uint16_t>(std::isnan(bad) ? (dtype == FLATMTL_F16 ? 0x7e00 : 0x7fc0)
                                                                  : (dtype == FLATMTL_F16 ? 0x7c00 : 0x7f80));
      if (size_of(dtype) == 2)
        std::memcpy(s.at(1, 39), &half, 2);
      else
        s.set(1, 39, bad);
      const auto gr = g.rows(), sr = s.rows();
      Context context(3);
      std::vector<double> pair(36), single(9), norms(3);
      flatmtl_error error{};
      REQUIRE(flatmtl_gramian_pair(context, &gr, &sr, 1, pair.data(), &error) == FLATMTL_ERROR_NONFINITE);
      REQUIRE(error.row == 4);
      REQUIRE(flatmtl_gramian(context, &sr, single.data(), &error) == FLATMTL_ERROR_NONFINITE);
      REQUIRE(error.row == 1);
      REQUIRE(std::isfinite(single[0]));
      REQUIRE(flatmtl_sq_norms(context, &sr, nullptr, 0.0, norms.data(), &error) == FLATMTL_ERROR_NONFINITE);
      REQUIRE(error.row == 1);
    }
}

TEST_CASE("Bad arguments are refused by a status that names them, before anything is written") {
  Rows g(FLATMTL_F32, 2, {8, 4}), other(FLATMTL_F32, 2, {4, 8}), wide(FLATMTL_F64, 2, {8, 4}),
      one(FLATMTL_F32, 1, {8, 4});
  g.fill(12);
  one.fill(13);
  const auto before = one.bytes;
  const auto gr = g.rows(), otherr = other.rows(), wider = wide.rows(), oner = one.rows();
  const auto out = one.vector();
  Context context(2);
  double gramian[16], weights[2] = {1.0, 1.0};
  flatmtl_error error{};
  auto named = [&](const char *argument) { return error.argument && std::string(error.argument) == argument; };

  REQUIRE(flatmtl_gramian(nullptr, &gr, gramian, &error) == FLATMTL_ERROR_NULL);
  REQUIRE(named("context"));
  REQUIRE(flatmtl_gramian(context, nullptr, gramian, &error) == FLATMTL_ERROR_NULL);
  REQUIRE(named("rows"));
  REQUIRE(flatmtl_gramian(context, &gr, nullptr, &error) == FLATMTL_ERROR_NULL);
  auto bad = gr;
  bad.num_rows = 0;
  REQUIRE(flatmtl_gramian(context, &bad, gramian, &error) == FLATMTL_ERROR_NUM_TASKS);
  bad = gr;
  const int64_t negative[] = {8, -4};
  bad.lengths = negative;
  REQUIRE(flatmtl_gramian(context, &bad, gramian, &error) == FLATMTL_ERROR_SIZE);
  REQUIRE(error.segment == 1);
  bad = gr;
  bad.dtype = static_cast<flatmtl_dtype>(9);
  REQUIRE(flatmtl_gramian(context, &bad, gramian, &error) == FLATMTL_ERROR_DTYPE);
  const void *holes[] = {g.pointers[0], g.pointers[1], nullptr, g.pointers[3]};
  bad = gr;
  bad.data = holes;
  REQUIRE(flatmtl_gramian(context, &bad, gramian, &error) == FLATMTL_ERROR_NULL);
  REQUIRE(error.row == 1);
  REQUIRE(error.segment == 0);
  REQUIRE(flatmtl_gramian_pair(context, &gr, &otherr, 1, gramian, &error) == FLATMTL_ERROR_MISMATCH);
  REQUIRE(named("perturbed_rows"));
  REQUIRE(flatmtl_gramian_pair(context, &gr, &wider, 1, gramian, &error) == FLATMTL_ERROR_DTYPE);
  REQUIRE(flatmtl_gramian_pair(context, &gr, &oner, 1, gramian, &error) == FLATMTL_ERROR_MISMATCH);
  REQUIRE(flatmtl_sq_norms(context, &gr, &oner, -1.0, gramian, &error) == FLATMTL_ERROR_OPTION);
  REQUIRE(named("eta"));
  flatmtl_context small = context.value;
  small.workspace_size = 8;
  REQUIRE(flatmtl_gramian(&small, &gr, gramian, &error) == FLATMTL_ERROR_SIZE);

  weights[1] = NAN;
  REQUIRE(flatmtl_combine(context, &gr, weights, &out, &error) == FLATMTL_ERROR_NONFINITE);
  REQUIRE(error.row == 1);
  weights[1] = 1.0;
  const flatmtl_vector inside = {FLATMTL_F32, 2, g.lengths.data(), g.pointers.data() + 2};
  REQUIRE(flatmtl_combine(context, &gr, weights, &inside, &error) == FLATMTL_ERROR_OVERLAP);
  REQUIRE(flatmtl_copy(context, &out, &oner, &error) == FLATMTL_ERROR_OVERLAP);
  const double scale[] = {INFINITY, 1.0};
  const flatmtl_rows first = {FLATMTL_F32, 1, 2, g.lengths.data(), g.pointers.data()};
  REQUIRE(flatmtl_perturb(context, &out, &first, &first, scale, 0, 0.0, &error) == FLATMTL_ERROR_NONFINITE);
  REQUIRE(one.bytes == before);

  size_t bytes = 0;
  REQUIRE(flatmtl_workspace_size(0, &bytes, &error) == FLATMTL_ERROR_NUM_TASKS);
  REQUIRE(flatmtl_workspace_size(FLATMTL_MAX_TASKS + 1, &bytes, &error) == FLATMTL_ERROR_NUM_TASKS);
  REQUIRE(flatmtl_select_isa("mmx", &error) == FLATMTL_ERROR_NAME);
  char text[200];
  REQUIRE(flatmtl_error_message(&error, text, sizeof text) == FLATMTL_OK);
  REQUIRE(std::string(text).find("name") != std::string::npos);
  REQUIRE(flatmtl_error_message(&error, text, 0) == FLATMTL_ERROR_SIZE);
  REQUIRE(flatmtl_error_message(nullptr, text, 5) == FLATMTL_ERROR_NULL);
}

TEST_CASE("The workspace is enough for fewer tasks too, and nothing is written past its end") {
  size_t before = 0;
  for (int32_t k = 1; k <= 300; k++) {
    size_t bytes = 0;
    REQUIRE(flatmtl_workspace_size(k, &bytes, nullptr) == FLATMTL_OK);
    REQUIRE(bytes >= before);
    before = bytes;
  }
  // Long enough for as many partial sums as there ever are; every row is the same memory.
  const int32_t k = 46;
  const std::vector<float> row(1 << 20, 1.0f);
  const int64_t length = static_cast<int64_t>(row.size());
  const std::vector<const void *> data(k, row.data());
  const flatmtl_rows rows{FLATMTL_F32, k, 1, &length, data.data()};
  size_t bytes = 0;
  REQUIRE(flatmtl_workspace_size(k, &bytes, nullptr) == FLATMTL_OK);
  auto *memory = static_cast<unsigned char *>(std::aligned_alloc(64, bytes + 64 * 1024));
  std::memset(memory + bytes, 0x5a, 4096);
  flatmtl_context context{};
  context.workspace = memory;
  context.workspace_size = bytes;
  std::vector<double> gramian(k * k);
  REQUIRE(flatmtl_gramian(&context, &rows, gramian.data(), nullptr) == FLATMTL_OK);
  for (double value : gramian) REQUIRE(value == static_cast<double>(length));
  for (int i = 0; i < 4096; i++) REQUIRE(memory[bytes + static_cast<size_t>(i)] == 0x5a);
  std::free(memory);
}

TEST_CASE("More rows than are combined at once have the same sum") {
  for (auto dtype : {FLATMTL_F32, FLATMTL_F64})
    for (bool flat : {false, true}) {
      const int32_t k = 9;
      Rows g(dtype, k, {3, 700}), s(dtype, k, {3, 700}), few(dtype, 1, {3, 700}), many(dtype, 1, {3, 700});
      g.fill(1);
      s.fill(2);
      std::vector<double> a(k), b(k);
      for (int32_t i = 0; i < k - 1; i++) a[i] = 0.1 * i - 1.7, b[i] = 0.3 - 0.01 * i;  // the last weighs nothing
      Context context(k);
      auto gr = g.rows(), sr = s.rows();
      const auto f = few.vector(), m = many.vector();
      for (int32_t rows : {k, k - 1}) {
        gr.num_rows = sr.num_rows = rows;
        const auto *out = rows == k ? &m : &f;
        REQUIRE((flat ? flatmtl_combine_pair(context, &gr, &sr, a.data(), b.data(), out, nullptr)
                      : flatmtl_combine(context, &gr, a.data(), out, nullptr)) == FLATMTL_OK);
      }
      REQUIRE(few.bytes == many.bytes);
    }
}
