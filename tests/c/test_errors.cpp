// Every function refuses every wrong argument by a status that names it, and writes to nothing but *error. The rest
// is in test_refused_*.cpp.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "catch.h"
#include "errors_support.h"
#include "support.h"

namespace {

// Arguments that are valid for K = 2 tasks and rows of two segments.
struct Arguments {
  Arguments() {
    for (Rows *r : {&g, &s, &saved, &params, &out}) r->fill(1);
    g.fill(3);
    s.fill(4);
    flatmtl_settings_default(&settings, nullptr);
    flatmtl_step_size(2, &bytes, nullptr);
    memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    problem = {2, params.vector(), saved.vector(), g.rows(), s.rows(), own, own, own_rows, own_rows};
    flatmtl_step_init(memory, bytes, &problem, &settings, &step, nullptr);
    flatmtl_step_begin(step, context, nullptr);
    for (int i = 0; i < 2; i++) {
      flatmtl_step_perturb(step, context, i, nullptr);
      flatmtl_step_restore(step, context, nullptr);
    }
    flatmtl_step_finish(step, context, nullptr);
  }
  ~Arguments() { std::free(memory); }
  Arguments(const Arguments &) = delete;
  Arguments &operator=(const Arguments &) = delete;

  Context context{2};
  Rows g{FLATMTL_F32, 2, {5, 3}}, s{FLATMTL_F32, 2, {5, 3}}, saved{FLATMTL_F32, 1, {5, 3}},
      params{FLATMTL_F32, 1, {5, 3}}, out{FLATMTL_F32, 1, {5, 3}};
  flatmtl_rows g_rows = g.rows(), s_rows = s.rows(), saved_rows = saved.rows(), params_rows = params.rows();
  flatmtl_rows one_gradient = {FLATMTL_F32, 1, 2, g.lengths.data(), g.pointers.data()};
  flatmtl_vector out_vector = out.vector();
  double scale[2] = {0.1, 0.2}, w[2] = {1, 1}, v[2] = {0.5, 0.5};
  double gramian[4] = {2, 0.5, 0.5, 1}, pair[16] = {};
  double result[16] = {}, result2[2] = {};
  double losses[2] = {1, 2}, after[2] = {0.5, 1.5}, state[32] = {};
  flatmtl_settings settings{};
  flatmtl_vector own[2] = {{FLATMTL_F32, 0, nullptr, nullptr}, {FLATMTL_F32, 0, nullptr, nullptr}};
  flatmtl_rows own_rows[2] = {{FLATMTL_F32, 1, 0, nullptr, nullptr}, {FLATMTL_F32, 1, 0, nullptr, nullptr}};
  flatmtl_problem problem{};
  void *memory = nullptr;
  size_t bytes = 0, size = 0;
  flatmtl_step *step = nullptr, *other = nullptr;
  flatmtl_record record{};
  flatmtl_method method = FLATMTL_SUM;
  flatmtl_weighting weighting = FLATMTL_WEIGHTING_UW;
  int32_t count = 16;
  int64_t state_count = 0;
};

std::vector<Call> calls(Arguments &a) {
  const flatmtl_context *context = a.context;
  for (int i = 0; i < 4; i++) a.pair[5 * i] = 1.0;
  return {
      {"workspace_size",
       {"bytes"},
       [&a](int n, flatmtl_error *e) { return flatmtl_workspace_size(2, unless(n == 0, &a.size), e); }},
      {"select_isa",
       {"name"},
       [](int n, flatmtl_error *e) { return flatmtl_select_isa(unless(n == 0, flatmtl_isa()), e); }},
      {"sq_norms",
       {"context", "rows", "sq_norms"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_sq_norms(unless(n == 0, context), unless(n == 1, &a.g_rows), nullptr, 0.0,
                                 unless(n == 2, a.result), e);
       }},
      {"gramian",
       {"context", "rows", "gramian"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_gramian(unless(n == 0, context), unless(n == 1, &a.g_rows), unless(n == 2, a.result), e);
       }},
      {"gramian_pair",
       {"context", "loss_rows", "perturbed_rows", "gramian"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_gramian_pair(unless(n == 0, context), unless(n == 1, &a.g_rows), unless(n == 2, &a.s_rows), 1,
                                     unless(n == 3, a.result), e);
       }},
      {"combine",
       {"context", "rows", "weights", "out"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_combine(unless(n == 0, context), unless(n == 1, &a.g_rows), unless(n == 2, a.w),
                                unless(n == 3, &a.out_vector), e);
       }},
      {"combine_pair",
       {"context", "loss_rows", "perturbed_rows", "loss_weights", "flat_weights", "out"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_combine_pair(unless(n == 0, context), unless(n == 1, &a.g_rows), unless(n == 2, &a.s_rows),
                                     unless(n == 3, a.w), unless(n == 4, a.v), unless(n == 5, &a.out_vector), e);
       }},
      {"perturb",
       {"context", "params", "saved", "gradient", "scale"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_perturb(unless(n == 0, context), unless(n == 1, &a.out_vector), unless(n == 2, &a.saved_rows),
                                unless(n == 3, &a.one_gradient), unless(n == 4, a.scale), 0, 0.0, e);
       }},
      {"copy",
       {"context", "to", "from"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_copy(unless(n == 0, context), unless(n == 1, &a.out_vector), unless(n == 2, &a.saved_rows), e);
       }},
      {"method_by_name",
       {"name", "method"},
       [&a](int n, flatmtl_error *e) {
         return flatmtl_method_by_name(unless(n == 0, "mgda"), unless(n == 1, &a.method), e);
       }},
      {"method_defaults",
       {"num_options"},
       [&a](int n, flatmtl_error *e) {
         a.count = 16;
         return flatmtl_method_defaults(FLATMTL_CAGRAD, 2, a.result, unless(n == 0, &a.count), e);
       }},
      {"settings_default",
       {"settings"},
       [&a](int n, flatmtl_error *e) { return flatmtl_settings_default(unless(n == 0, &a.settings), e); }},
      {"step_weights",
       {"context", "settings", "gramian_pair", "loss_weights", "flat_weights"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_step_weights(unless(n == 0, context), unless(n == 1, &a.settings), 2, unless(n == 2, a.pair),
                                     nullptr, unless(n == 3, a.result), unless(n == 4, a.result2), nullptr, e);
       }},
      {"weighting_by_name",
       {"name", "weighting"},
       [&a](int n, flatmtl_error *e) {
         return flatmtl_weighting_by_name(unless(n == 0, "uw"), unless(n == 1, &a.weighting), e);
       }},
      {"weighting_defaults",
       {"num_options"},
       [&a](int n, flatmtl_error *e) {
         a.count = 16;
         return flatmtl_weighting_defaults(FLATMTL_WEIGHTING_UW, 2, a.result, unless(n == 0, &a.count), e);
       }},
      {"weighting_state_size",
       {"count"},
       [&a](int n, flatmtl_error *e) {
         return flatmtl_weighting_state_size(FLATMTL_WEIGHTING_UW, 2, unless(n == 0, &a.state_count), e);
       }},
      {"loss_weights",
       {"context", "losses", "state", "weights"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_loss_weights(unless(n == 0, context), FLATMTL_WEIGHTING_UW, nullptr, 0, 2,
                                     unless(n == 1, a.losses), nullptr, unless(n == 2, a.state),
                                     unless(n == 3, a.result), e);
       }},
      {"loss_observe",
       {"context", "losses", "losses_after", "state"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_loss_observe(unless(n == 0, context), FLATMTL_WEIGHTING_FAMO, nullptr, 0, 2,
                                     unless(n == 1, a.losses), unless(n == 2, a.after), unless(n == 3, a.state), e);
       }},
      {"step_size",
       {"bytes"},
       [&a](int n, flatmtl_error *e) { return flatmtl_step_size(2, unless(n == 0, &a.size), e); }},
      {"step_init",
       {"memory", "problem", "settings", "step"},
       [&a](int n, flatmtl_error *e) {
         return flatmtl_step_init(unless(n == 0, a.memory), a.bytes, unless(n == 1, &a.problem),
                                  unless(n == 2, &a.settings), unless(n == 3, &a.other), e);
       }},
  };
}

// The functions of the state machine, in an order in which they can be called.
std::vector<Call> step_calls(Arguments &a) {
  const flatmtl_context *context = a.context;
  return {
      {"step_record",
       {"step", "record"},
       [&a](int n, flatmtl_error *e) {
         return flatmtl_step_record(unless(n == 0, a.step), unless(n == 1, &a.record), e);
       }},
      {"step_update",
       {"step", "context", "out"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_step_update(unless(n == 0, a.step), unless(n == 1, context), unless(n == 2, &a.out_vector), e);
       }},
      {"step_begin",
       {"step", "context"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_step_begin(unless(n == 0, a.step), unless(n == 1, context), e);
       }},
      {"step_perturb",
       {"step", "context"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_step_perturb(unless(n == 0, a.step), unless(n == 1, context), 0, e);
       }},
      {"step_restore",
       {"step", "context"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_step_restore(unless(n == 0, a.step), unless(n == 1, context), e);
       }},
      {"step_finish",
       {"step", "context"},
       [&a, context](int n, flatmtl_error *e) {
         return flatmtl_step_finish(unless(n == 0, a.step), unless(n == 1, context), e);
       }},
  };
}

}  // namespace

TEST_CASE("Every pointer that a function needs is named when it is NULL", "[errors]") {
  Arguments a;
  for (const Call &call : calls(a)) {
    const std::vector<char> out = a.out.bytes;
    check_null(call);
    CHECK(a.out.bytes == out);
    CHECK(call.call(-1, nullptr) >= 0);
  }
  for (double value : a.after) CHECK(value > 0.0);
}

TEST_CASE("The state machine names every pointer that is NULL, and stays where it is", "[errors]") {
  Arguments a;
  for (const Call &call : step_calls(a)) {
    check_null(call);
    CHECK(call.call(-1, nullptr) >= 0);
    if (call.name == "step_restore")  // the other task
      CHECK(
          (flatmtl_step_perturb(a.step, a.context, 1, nullptr) == FLATMTL_OK && call.call(-1, nullptr) == FLATMTL_OK));
  }
}

TEST_CASE("Numbers of tasks out of range are refused by every function that takes one", "[errors]") {
  Arguments a;
  for (const int32_t tasks : {0, -1, FLATMTL_MAX_TASKS + 1, INT32_MIN, INT32_MAX}) {
    INFO(tasks);
    CHECK(flatmtl_workspace_size(tasks, &a.size, nullptr) == FLATMTL_ERROR_NUM_TASKS);
    CHECK(flatmtl_step_size(tasks, &a.size, nullptr) == FLATMTL_ERROR_NUM_TASKS);
    CHECK(flatmtl_method_defaults(FLATMTL_FIXED, tasks, nullptr, &a.count, nullptr) == FLATMTL_ERROR_NUM_TASKS);
    CHECK(flatmtl_weighting_defaults(FLATMTL_WEIGHTING_FIXED, tasks, nullptr, &a.count, nullptr) ==
          FLATMTL_ERROR_NUM_TASKS);
    CHECK(flatmtl_weighting_state_size(FLATMTL_WEIGHTING_UW, tasks, &a.state_count, nullptr) ==
          FLATMTL_ERROR_NUM_TASKS);
    CHECK(flatmtl_step_weights(a.context, &a.settings, tasks, a.pair, nullptr, a.result, a.result2, nullptr, nullptr) ==
          FLATMTL_ERROR_NUM_TASKS);
    CHECK(flatmtl_loss_weights(a.context, FLATMTL_WEIGHTING_UW, nullptr, 0, tasks, a.losses, nullptr, a.state, a.result,
                               nullptr) == FLATMTL_ERROR_NUM_TASKS);
    flatmtl_rows rows = a.g_rows;
    rows.num_rows = tasks;
    CHECK(flatmtl_gramian(a.context, &rows, a.result, nullptr) == FLATMTL_ERROR_NUM_TASKS);
    flatmtl_problem problem = a.problem;
    problem.num_tasks = tasks;
    CHECK(flatmtl_step_init(a.memory, a.bytes, &problem, &a.settings, &a.other, nullptr) == FLATMTL_ERROR_NUM_TASKS);
  }
}

TEST_CASE("Sizes that are negative, and memory that is too small, are refused", "[errors]") {
  Arguments a;
  const int64_t negative[2] = {5, -3};
  flatmtl_rows rows = a.g_rows;
  flatmtl_error error{};
  rows.lengths = negative;
  CHECK(flatmtl_gramian(a.context, &rows, a.result, &error) == FLATMTL_ERROR_SIZE);
  CHECK(error.segment == 1);
  CHECK(error.value == -3.0);
  rows = a.g_rows;
  rows.num_segments = -1;
  CHECK(flatmtl_gramian_pair(a.context, &rows, &a.s_rows, 1, a.result, &error) == FLATMTL_ERROR_SIZE);
  flatmtl_vector out = a.out_vector;
  out.num_segments = -1;
  CHECK(flatmtl_copy(a.context, &out, &a.saved_rows, &error) == FLATMTL_ERROR_SIZE);
  CHECK(std::string(error.argument) == "to");
  CHECK(flatmtl_step_init(a.memory, a.bytes - 1, &a.problem, &a.settings, &a.other, &error) == FLATMTL_ERROR_SIZE);
  flatmtl_context small = a.context.value;
  small.workspace_size -= 1;
  CHECK(flatmtl_gramian(&small, &a.g_rows, a.result, &error) == FLATMTL_ERROR_SIZE);
  small = a.context.value;
  small.workspace = nullptr;
  CHECK(flatmtl_gramian(&small, &a.g_rows, a.result, &error) == FLATMTL_ERROR_NULL);
  a.count = -1;
  CHECK(flatmtl_method_defaults(FLATMTL_CAGRAD, 2, a.result, &a.count, &error) == FLATMTL_ERROR_SIZE);
}

TEST_CASE("Tables that differ, and outputs that overlap, are refused by every kernel", "[errors]") {
  Arguments a;
  Rows shorter(FLATMTL_F32, 2, {5, 2}), wide(FLATMTL_F64, 2, {5, 3}), cut(FLATMTL_F32, 2, {8});
  flatmtl_error error{};
  for (const Rows *bad : {&shorter, &wide, &cut}) {
    const flatmtl_status wanted = bad == &wide ? FLATMTL_ERROR_DTYPE : FLATMTL_ERROR_MISMATCH;
    const flatmtl_rows rows = bad->rows();
    const flatmtl_rows row = {rows.dtype, 1, rows.num_segments, rows.lengths, rows.data};
    const flatmtl_vector vector = bad->vector();
    CHECK(flatmtl_sq_norms(a.context, &a.g_rows, &row, 0.0, a.result, &error) == wanted);
    CHECK(flatmtl_gramian_pair(a.context, &a.g_rows, &rows, 1, a.result, &error) == wanted);
    CHECK(flatmtl_combine(a.context, &a.g_rows, a.w, &vector, &error) == wanted);
    CHECK(flatmtl_combine_pair(a.context, &a.g_rows, &rows, a.w, a.v, &a.out_vector, &error) == wanted);
    CHECK(flatmtl_perturb(a.context, &a.out_vector, &row, &a.one_gradient, a.scale, 0, 0.0, &error) == wanted);
    CHECK(flatmtl_copy(a.context, &vector, &a.saved_rows, &error) == wanted);
    flatmtl_problem problem = a.problem;
    problem.shared_loss = rows;
    CHECK(flatmtl_step_init(a.memory, a.bytes, &problem, &a.settings, &a.other, &error) == wanted);
  }
  const flatmtl_vector inside = {FLATMTL_F32, 2, a.g.lengths.data(), a.g.pointers.data() + 2};
  CHECK(flatmtl_combine(a.context, &a.g_rows, a.w, &inside, &error) == FLATMTL_ERROR_OVERLAP);
  CHECK(flatmtl_combine_pair(a.context, &a.g_rows, &a.s_rows, a.w, a.v, &inside, &error) == FLATMTL_ERROR_OVERLAP);
  const flatmtl_vector first = {FLATMTL_F32, 2, a.g.lengths.data(), a.g.pointers.data()};
  CHECK(flatmtl_perturb(a.context, &first, &a.saved_rows, &a.one_gradient, a.scale, 0, 0.0, &error) ==
        FLATMTL_ERROR_OVERLAP);
  CHECK(flatmtl_copy(a.context, &first, &a.one_gradient, &error) == FLATMTL_ERROR_OVERLAP);
  flatmtl_problem problem = a.problem;
  problem.shared_saved = problem.shared;
  CHECK(flatmtl_step_init(a.memory, a.bytes, &problem, &a.settings, &a.other, &error) == FLATMTL_ERROR_OVERLAP);
  CHECK(flatmtl_loss_weights(a.context, FLATMTL_WEIGHTING_UW, nullptr, 0, 2, a.losses, nullptr, a.state, a.losses,
                             &error) == FLATMTL_ERROR_OVERLAP);
}

TEST_CASE("An overlap is found wherever it is among many scattered segments", "[errors]") {
  const int64_t count = 700, length = 8;  // more than fit in one batch without scratch memory
  std::vector<float> memory(static_cast<size_t>(4 * count * length));
  std::vector<int64_t> lengths(count, length);
  std::mt19937_64 random(11);
  std::vector<size_t> place(2 * count);
  for (size_t i = 0; i < place.size(); i++) place[i] = i;
  std::shuffle(place.begin(), place.end(), random);
  std::vector<void *> to(count);
  std::vector<const void *> from(count);
  const auto lay_out = [&](bool in_order) {
    for (int64_t t = 0; t < count; t++) {
      to[t] = memory.data() + (in_order ? static_cast<size_t>(2 * t) : place[t]) * 2 * length;
      from[t] = memory.data() + (in_order ? static_cast<size_t>(2 * t + 1) : place[count + t]) * 2 * length;
    }
  };
  Context context(1);
  const flatmtl_vector out = {FLATMTL_F32, count, lengths.data(), to.data()};
  const flatmtl_rows in = {FLATMTL_F32, 1, count, lengths.data(), from.data()};
  flatmtl_error error{};
  lay_out(false);
  REQUIRE(flatmtl_copy(context, &out, &in, &error) == FLATMTL_OK);
  for (int trial = 0; trial < 300; trial++) {
    lay_out(trial % 4 < 2);
    const int64_t a = static_cast<int64_t>(random() % count),
                  b = trial % 4 == 0 ? a : static_cast<int64_t>(random() % count);
    const int64_t shift = static_cast<int64_t>(random() % (2 * length - 1)) - (length - 1);  // by one element at least
    auto *target = static_cast<float *>(to[a]);
    const int among_outputs = trial % 2;
    if (among_outputs && a == b) continue;
    if (target + shift < memory.data()) continue;
    (among_outputs ? to[b] : const_cast<void *&>(from[b])) = target + shift;
    CAPTURE(trial, a, b, shift);
    REQUIRE(flatmtl_copy(context, &out, &in, &error) == FLATMTL_ERROR_OVERLAP);
    if (!among_outputs) REQUIRE(error.segment == b);
  }
}

TEST_CASE("Names and numbers that do not exist are refused", "[errors]") {
  Arguments a;
  for (const char *name : {"", "Mgda", "mgda ", "nothing"}) {
    CHECK(flatmtl_method_by_name(name, &a.method, nullptr) == FLATMTL_ERROR_NAME);
    CHECK(flatmtl_weighting_by_name(name, &a.weighting, nullptr) == FLATMTL_ERROR_NAME);
    CHECK(flatmtl_select_isa(name, nullptr) == FLATMTL_ERROR_NAME);
  }
  for (const int number : {-1, 1000}) {
    const auto method = static_cast<flatmtl_method>(number);
    const auto weighting = static_cast<flatmtl_weighting>(number);
    CHECK(flatmtl_method_name(method) == nullptr);
    CHECK(flatmtl_weighting_name(weighting) == nullptr);
    CHECK(flatmtl_weighting_observes(weighting) == 0);
    CHECK(flatmtl_method_defaults(method, 2, nullptr, &a.count, nullptr) == FLATMTL_ERROR_NAME);
    CHECK(flatmtl_weighting_state_size(weighting, 2, &a.state_count, nullptr) == FLATMTL_ERROR_NAME);
    for (int field = 0; field < 4; field++) {
      flatmtl_settings settings = a.settings;
      if (field == 0) settings.method = method;
      if (field == 1) settings.combine = static_cast<flatmtl_combination>(number);
      if (field == 2) settings.family_scale = static_cast<flatmtl_family_scale>(number);
      if (field == 3) settings.norm = static_cast<flatmtl_norm>(number);
      CHECK(flatmtl_step_init(a.memory, a.bytes, &a.problem, &settings, &a.other, nullptr) == FLATMTL_ERROR_NAME);
    }
    flatmtl_rows rows = a.g_rows;
    rows.dtype = static_cast<flatmtl_dtype>(number);
    CHECK(flatmtl_gramian(a.context, &rows, a.result, nullptr) == FLATMTL_ERROR_DTYPE);
  }
}
