// What the tests of refusals share: valid arguments, and the check that a wrong one is named and changes nothing.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "catch.h"
#include "errors_support.h"
#include "support.h"

// The small arrays of a call.
struct Numbers {
  double losses[2] = {1, 2}, after[2] = {0.5, 1.5}, squares[2] = {1, 4}, factors[2] = {1, 1}, keep[2] = {0.5, 0.25};
  double weights[2] = {1, 1}, flat[2] = {0.5, 0.5}, scale[2] = {0.1, 0.2}, leak[2] = {0, 0.5};
  double gramian[4] = {2, 0.5, 0.5, 1}, pair[16] = {}, state[32] = {}, options[8] = {}, result[16] = {};
};

// Arguments that are valid for two tasks and rows of two segments.
struct World {
  World() {
    g.fill(1);
    s.fill(2);
    memory.fill(3);
    for (int i = 0; i < 4; i++) n.pair[5 * i] = 1.0;
    flatmtl_settings_default(&settings, nullptr);
    gradvac.method = FLATMTL_GRADVAC;
    gradvac.state = n.state;
    size_t bytes = 0;
    flatmtl_step_size(2, &bytes, nullptr);
    step_memory.resize((bytes + 63) / 64 * 8 + 8);
    room = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(step_memory.data()) + 63) / 64 * 64);
    step_bytes = bytes;
    problem = {2, params.vector(), saved.vector(), g_rows, s_rows, own, own_saved, own_loss, own_perturbed};
  }
  // All that a refused call has to leave alone.
  std::vector<char> bytes() const {
    std::vector<char> all;
    for (const Rows *rows : {&g, &s, &memory, &out, &params, &saved})
      all.insert(all.end(), rows->bytes.begin(), rows->bytes.end());
    const char *numbers = reinterpret_cast<const char *>(&n);
    all.insert(all.end(), numbers, numbers + sizeof n);
    return all;
  }
  flatmtl_mixed_rows mixed(const flatmtl_rows *loss, const flatmtl_rows *perturbed = nullptr) const {
    return {loss, perturbed, nullptr, nullptr};
  }

  Context context{2};
  Rows g{FLATMTL_F32, 2, {5, 3}}, s{FLATMTL_F32, 2, {5, 3}}, memory{FLATMTL_F32, 2, {5, 3}},
      out{FLATMTL_F32, 1, {5, 3}}, params{FLATMTL_F32, 1, {5, 3}}, saved{FLATMTL_F32, 1, {5, 3}};
  flatmtl_rows g_rows = g.rows(), s_rows = s.rows(), saved_rows = saved.rows(), memory_rows = memory.rows();
  flatmtl_rows row = {FLATMTL_F32, 1, 2, g.lengths.data(), g.pointers.data()};
  flatmtl_vector target = out.vector();
  flatmtl_buffers buffers = {FLATMTL_F32, 2, 2, memory.lengths.data(), memory.pointers.data()};
  flatmtl_mixed_rows x = {&g_rows, &s_rows, nullptr, nullptr};
  Numbers n;
  flatmtl_settings settings{}, gradvac{};
  Rows own_rows{FLATMTL_F32, 8, {4}};
  flatmtl_vector own[2] = {own_vector(0), own_vector(1)}, own_saved[2] = {own_vector(2), own_vector(3)};
  flatmtl_rows own_loss[2] = {own_row(4), own_row(5)}, own_perturbed[2] = {own_row(6), own_row(7)};
  flatmtl_problem problem{};
  std::vector<uint64_t> step_memory;
  char *room = nullptr;
  size_t step_bytes = 0;

 private:
  flatmtl_vector own_vector(size_t i) const { return {FLATMTL_F32, 1, own_rows.lengths.data(), &own_rows.pointers[i]}; }
  flatmtl_rows own_row(size_t i) const { return {FLATMTL_F32, 1, 1, own_rows.lengths.data(), &own_rows.pointers[i]}; }
};

// The dtype may be none, which C++ must not load as one.
inline flatmtl_vector as_vector(const flatmtl_rows &rows) {
  flatmtl_vector vector = {FLATMTL_F32, rows.num_segments, rows.lengths, const_cast<void *const *>(rows.data)};
  std::memcpy(&vector.dtype, &rows.dtype, sizeof rows.dtype);
  return vector;
}

inline flatmtl_buffers as_buffers(const flatmtl_rows &rows) {
  flatmtl_buffers buffers = {FLATMTL_F32, rows.num_rows, rows.num_segments, rows.lengths,
                             const_cast<void *const *>(rows.data)};
  std::memcpy(&buffers.dtype, &rows.dtype, sizeof rows.dtype);
  return buffers;
}

// A wrong call: its status, and the argument that it names.
struct Refusal {
  std::string what;
  flatmtl_status status;
  std::string argument;
  std::function<flatmtl_status(flatmtl_error *error)> call;
};

inline void check_refused(const World &w, const std::vector<Refusal> &refusals) {
  const std::vector<char> before = w.bytes();
  for (const Refusal &refusal : refusals) {
    INFO(refusal.what);
    flatmtl_error error{};
    CHECK(refusal.call(&error) == refusal.status);
    CHECK(error.status == refusal.status);
    CHECK(std::string(error.argument ? error.argument : "none") == refusal.argument);
    CHECK(refusal.call(nullptr) == refusal.status);
    CHECK(w.bytes() == before);
  }
}
