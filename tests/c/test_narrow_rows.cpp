// Rows of BF16 or F16 beside F32 vectors: the bits are those of the same values in F32, whatever the instruction set,
// the threads and the segments; and any other pair of dtypes is refused.
#include <array>
#include <cmath>

#include "catch.h"
#include "support.h"

namespace {

const std::vector<flatmtl_dtype> narrow = {FLATMTL_BF16, FLATMTL_F16};

// The same values in F32, by the definitions of the narrow formats.
Rows widened(const Rows &rows) {
  Rows wide(FLATMTL_F32, rows.num_rows, rows.lengths);
  for (int32_t i = 0; i < rows.num_rows; i++)
    for (int64_t p = 0; p < rows.length(); p++) wide.set(i, p, rows.get(i, p));
  return wide;
}

void append(std::vector<char> &out, const Rows &rows) {
  const std::vector<char> more = rows.recut({rows.length()}).bytes;
  out.insert(out.end(), more.begin(), more.end());
}

void append(std::vector<char> &out, const std::vector<double> &values) {
  const char *bytes = reinterpret_cast<const char *>(values.data());
  out.insert(out.end(), bytes, bytes + values.size() * sizeof(double));
}

// Everything that rows g and s give beside vectors of F32.
std::vector<char> results(const Rows &g, const Rows &s, const Rows &theta, int threads) {
  const int32_t k = g.num_rows;
  Context context(k, threads);
  Rows out(FLATMTL_F32, 1, g.lengths), memory(FLATMTL_F32, k, g.lengths);
  memory.fill(0, 0.0);
  const auto gr = g.rows(), sr = s.rows(), saved = theta.rows();
  const auto target = out.vector();
  std::vector<char> found;
  std::vector<double> a, b, norms(k), losses, state(3 * k, 0.0);
  for (int32_t i = 0; i < k; i++) a.push_back(0.3 - 0.1 * i), b.push_back(1.7 - 0.4 * i), losses.push_back(1.0 + i);
  REQUIRE(flatmtl_sq_norms(context, &gr, &saved, 0.1, norms.data(), nullptr) == FLATMTL_OK);
  append(found, norms);
  REQUIRE(flatmtl_combine(context, &gr, a.data(), &target, nullptr) == FLATMTL_OK);
  append(found, out);
  REQUIRE(flatmtl_combine_pair(context, &gr, &sr, a.data(), b.data(), &target, nullptr) == FLATMTL_OK);
  append(found, out);
  const flatmtl_rows one = {g.dtype, 1, gr.num_segments, gr.lengths, gr.data};
  const std::vector<double> scale(g.lengths.size(), 0.37);
  for (int adaptive : {0, 1}) {
    REQUIRE(flatmtl_perturb(context, &target, &saved, &one, scale.data(), adaptive, 0.1, nullptr) == FLATMTL_OK);
    append(found, out);
  }
  const flatmtl_mixed_rows mixed = {&gr, &sr, a.data(), b.data()};
  const flatmtl_buffers buffers = {FLATMTL_F32, k, gr.num_segments, gr.lengths, memory.pointers.data()};
  for (auto method : {FLATMTL_BUFFER_GRADDROP, FLATMTL_BUFFER_MOCO, FLATMTL_BUFFER_DB_MTL, FLATMTL_BUFFER_EXCESS_MTL}) {
    state.assign(state.size(), 0.0);
    memory.fill(0, 0.0);
    int64_t count = 0;
    REQUIRE(flatmtl_buffer_state_size(method, k, &count, nullptr, nullptr) == FLATMTL_OK);
    REQUIRE(flatmtl_buffer_update(context, method, nullptr, 0, &mixed, losses.data(), 0,
                                  method == FLATMTL_BUFFER_GRADDROP ? nullptr : &buffers,
                                  count ? state.data() : nullptr, nullptr, &target, nullptr) == FLATMTL_OK);
    append(found, out);
    append(found, memory);
    append(found, state);
  }
  return found;
}

}  // namespace

TEST_CASE("Narrow rows beside an F32 vector give the bits of the same values in F32") {
  const int64_t n = 33001;  // more than one range of the threads
  const std::vector<std::vector<int64_t>> cuts = {{n}, {0, 1, n - 1, 0}, {7, 511, 513, n - 1031}};
  const std::string before = flatmtl_isa();
  for (auto dtype : narrow)
    for (int32_t k : {1, 3, 9}) {  // 9: more than are combined at once
      Rows g(dtype, k, {n}), s(dtype, k, {n}), theta(FLATMTL_F32, 1, {n});
      g.fill(1);
      s.fill(2);
      theta.fill(3);
      std::vector<char> expected;
      for (const auto &isa : instruction_sets())
        for (size_t way = 0; way < cuts.size(); way++) {
          REQUIRE(flatmtl_select_isa(isa.c_str(), nullptr) == FLATMTL_OK);
          const Rows gc = g.recut(cuts[way]), sc = s.recut(cuts[way]), tc = theta.recut(cuts[way]);
          const int threads = std::array<int, 3>{{1, 2, 3}}[way];
          CAPTURE(isa, threads, k, static_cast<int>(dtype));
          if (expected.empty()) expected = results(widened(gc), widened(sc), tc, threads);
          REQUIRE((results(gc, sc, tc, threads) == expected));
          if (way == 1) REQUIRE((results(widened(gc), widened(sc), tc, threads) == expected));
        }
    }
  flatmtl_select_isa(before.c_str(), nullptr);
}

TEST_CASE("A combination of narrow rows is rounded once, to F32") {
  // 1 + 2^-7 is the number after 1 in BF16; 2^-24 and a little more above it is halfway and more to the next F32.
  Rows g(FLATMTL_BF16, 2, {1}), out(FLATMTL_F32, 1, {1});
  g.set(0, 0, 1.0 + 0x1p-7);
  g.set(1, 0, 0x1p-24 * (1.0 + 0x1p-7));
  const auto gr = g.rows();
  const auto target = out.vector();
  const double ones[] = {1.0, 1.0};
  Context context(2);
  REQUIRE(flatmtl_combine(context, &gr, ones, &target, nullptr) == FLATMTL_OK);
  REQUIRE(out.get(0, 0) == 1.0 + 0x1p-7 + 0x1p-23);
}

TEST_CASE("Rows beside a vector have its dtype, or are narrower than F32; nothing is written otherwise") {
  const std::vector<flatmtl_dtype> dtypes = {FLATMTL_F32, FLATMTL_F64, FLATMTL_BF16, FLATMTL_F16};
  const std::vector<int64_t> lengths = {5, 3};
  Context context(2);
  flatmtl_error error{};
  auto named = [&](const char *argument) { return error.argument && std::string(error.argument) == argument; };
  for (auto of_vector : dtypes)
    for (auto of_rows : dtypes) {
      const bool fits = of_rows == of_vector || (of_vector == FLATMTL_F32 && size_of(of_rows) == 2);
      const flatmtl_status expected = fits ? FLATMTL_OK : FLATMTL_ERROR_DTYPE;
      CAPTURE(static_cast<int>(of_vector), static_cast<int>(of_rows));
      Rows g(of_rows, 2, lengths), out(of_vector, 1, lengths), saved(of_vector, 1, lengths);
      g.fill(1);
      out.fill(2);
      saved.fill(3);
      const auto before = out.bytes;
      const auto gr = g.rows(), saved_rows = saved.rows();
      const auto target = out.vector();
      const flatmtl_rows one = {of_rows, 1, 2, g.lengths.data(), g.pointers.data()};
      double values[2] = {1.0, 1.0}, scale[2] = {0.1, 0.1};
      REQUIRE(flatmtl_sq_norms(context, &gr, &saved_rows, 0.1, values, &error) == expected);
      if (!fits) REQUIRE(named("params"));
      REQUIRE(flatmtl_combine(context, &gr, values, &target, &error) == expected);
      if (!fits) REQUIRE(named("out"));
      REQUIRE(flatmtl_combine_pair(context, &gr, &gr, values, values, &target, &error) == expected);
      if (!fits) REQUIRE(named("out"));
      REQUIRE(flatmtl_perturb(context, &target, &saved_rows, &one, scale, 0, 0.0, &error) == expected);
      if (!fits) REQUIRE(named("gradient"));
      const flatmtl_mixed_rows mixed = {&gr, nullptr, nullptr, nullptr};
      REQUIRE(flatmtl_graddrop(context, &mixed, nullptr, 0, 0, 0, 0, &target, &error) == expected);
      if (!fits) REQUIRE(named("out"));
      REQUIRE(flatmtl_buffer_update(context, FLATMTL_BUFFER_GRADDROP, nullptr, 0, &mixed, nullptr, 0, nullptr, nullptr,
                                    nullptr, &target, &error) == expected);
      if (!fits) REQUIRE(named("out"));
      if (!fits) REQUIRE(out.bytes == before);
    }
  // The families, and the parameters and their copy, are of one dtype each.
  Rows g(FLATMTL_BF16, 2, lengths), s(FLATMTL_F32, 2, lengths), out(FLATMTL_F32, 1, lengths);
  g.fill(1);
  s.fill(2);
  out.fill(3);
  const auto before = out.bytes;
  const auto gr = g.rows(), sr = s.rows();
  const auto target = out.vector();
  const flatmtl_rows one = {FLATMTL_BF16, 1, 2, g.lengths.data(), g.pointers.data()};
  const double ones[] = {1.0, 1.0};
  REQUIRE(flatmtl_combine_pair(context, &gr, &sr, ones, ones, &target, &error) == FLATMTL_ERROR_DTYPE);
  REQUIRE(named("perturbed_rows"));
  REQUIRE(flatmtl_perturb(context, &target, &one, &one, ones, 0, 0.0, &error) == FLATMTL_ERROR_DTYPE);
  REQUIRE(named("params"));
  REQUIRE(flatmtl_copy(context, &target, &one, &error) == FLATMTL_ERROR_DTYPE);
  REQUIRE(named("to"));
  // The segment table too, of narrow rows as of others.
  Rows other(FLATMTL_BF16, 2, {3, 5});
  other.fill(4);
  const auto wrong = other.rows();
  REQUIRE(flatmtl_combine(context, &wrong, ones, &target, &error) == FLATMTL_ERROR_MISMATCH);
  REQUIRE(out.bytes == before);
}

TEST_CASE("A step on narrow gradients is the step on the same values in F32") {
  const std::vector<int64_t> lengths = {700, 13}, own_lengths = {5};
  std::vector<std::vector<char>> found;
  Rows g(FLATMTL_BF16, 2, lengths), s(FLATMTL_BF16, 2, lengths), h(FLATMTL_BF16, 2, own_lengths);
  g.fill(1);
  s.fill(2);
  h.fill(3);
  for (bool wide : {false, true}) {
    const Rows loss = wide ? widened(g) : g.recut(lengths), perturbed = wide ? widened(s) : s.recut(lengths);
    const Rows own_loss = wide ? widened(h) : h.recut(own_lengths);
    Rows theta(FLATMTL_F32, 1, lengths), saved(FLATMTL_F32, 1, lengths), out(FLATMTL_F32, 1, lengths);
    Rows psi(FLATMTL_F32, 2, own_lengths), psi_saved(FLATMTL_F32, 2, own_lengths);
    theta.fill(4);
    psi.fill(5);
    flatmtl_vector own[2], own_saved[2];
    flatmtl_rows own_rows[2];
    for (int i = 0; i < 2; i++) {
      own[i] = {FLATMTL_F32, 1, psi.lengths.data(), psi.pointers.data() + i};
      own_saved[i] = {FLATMTL_F32, 1, psi.lengths.data(), psi_saved.pointers.data() + i};
      own_rows[i] = {own_loss.dtype, 1, 1, own_loss.lengths.data(), own_loss.pointers.data() + i};
    }
    const flatmtl_problem problem = {2,   theta.vector(), saved.vector(), loss.rows(), perturbed.rows(),
                                     own, own_saved,      own_rows,       own_rows};
    flatmtl_settings settings;
    flatmtl_settings_default(&settings, nullptr);
    settings.adaptive = 1;
    settings.eta = 0.1;
    Context context(2);
    size_t bytes = 0;
    REQUIRE(flatmtl_step_size(2, &bytes, nullptr) == FLATMTL_OK);
    void *memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    flatmtl_step *step = nullptr;
    REQUIRE(flatmtl_step_init(memory, bytes, &problem, &settings, &step, nullptr) == FLATMTL_OK);
    REQUIRE(flatmtl_step_begin(step, context, nullptr) == FLATMTL_OK);
    std::vector<char> all;
    for (int i = 0; i < 2; i++) {
      REQUIRE(flatmtl_step_perturb(step, context, i, nullptr) == FLATMTL_OK);
      append(all, theta);
      append(all, psi);
      REQUIRE(flatmtl_step_restore(step, context, nullptr) == FLATMTL_OK);
    }
    REQUIRE(flatmtl_step_finish(step, context, nullptr) == FLATMTL_OK);
    const flatmtl_vector target = out.vector();
    REQUIRE(flatmtl_step_update(step, context, &target, nullptr) == FLATMTL_OK);
    append(all, out);
    found.push_back(all);
    std::free(memory);
  }
  REQUIRE((found[0] == found[1]));
}
