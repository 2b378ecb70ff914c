// The state machine: closed forms of the paper, exact restore, order of calls, non-finite gradients.
#include <array>
#include <cmath>

#include "catch.h"
#include "support.h"

namespace {

constexpr int kTasks = 2, kShared = 3, kOwn = 2;

// Task i: loss = x'H_i x / 2 + |psi_i|^2 / 2 in f64, theta in two segments, psi_i in one.
struct Quadratic {
  Quadratic() {
    flatmtl_settings_default(&settings, nullptr);
    settings.method = FLATMTL_SUM;
    settings.rho_shared = 0.3;
    settings.rho_task = 0.2;
    for (int i = 0; i < kTasks; i++) {
      own_vectors[i] = {FLATMTL_F64, 1, &own_length, &own_pointers[i]};
      own_saved_vectors[i] = {FLATMTL_F64, 1, &own_length, &own_saved_pointers[i]};
      own_loss_rows[i] = {FLATMTL_F64, 1, 1, &own_length, &own_loss_pointers[i]};
      own_perturbed_rows[i] = {FLATMTL_F64, 1, 1, &own_length, &own_perturbed_pointers[i]};
    }
    problem.num_tasks = kTasks;
    problem.shared = {FLATMTL_F64, 2, lengths.data(), theta_pointers.data()};
    problem.shared_saved = {FLATMTL_F64, 2, lengths.data(), saved_pointers.data()};
    problem.shared_loss = {FLATMTL_F64, kTasks, 2, lengths.data(), g_pointers.data()};
    problem.shared_perturbed = {FLATMTL_F64, kTasks, 2, lengths.data(), s_pointers.data()};
    problem.own = own_vectors.data();
    problem.own_saved = own_saved_vectors.data();
    problem.own_loss = own_loss_rows.data();
    problem.own_perturbed = own_perturbed_rows.data();
    size_t bytes = 0;
    flatmtl_step_size(kTasks, &bytes, nullptr);
    memory.resize(bytes + 64);
    aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
    size = bytes;
  }
  flatmtl_status init() { return flatmtl_step_init(aligned, size, &problem, &settings, &step, &error); }
  void gradient(int task, double *shared, double *own) const {
    for (int r = 0; r < kShared; r++) {
      shared[r] = 0.0;
      for (int c = 0; c < kShared; c++) shared[r] += hessian[task][r][c] * theta[c];
    }
    for (int r = 0; r < kOwn; r++) own[r] = psi[task][r];
  }
  void losses() {
    for (int i = 0; i < kTasks; i++) gradient(i, g[i].data(), h[i].data());
  }
  void perturbed(int task) { gradient(task, s[task].data(), t[task].data()); }
  flatmtl_status run() {
    losses();
    flatmtl_status status = flatmtl_step_begin(step, context, &error);
    for (int i = 0; i < kTasks && status == FLATMTL_OK; i++) {
      status = flatmtl_step_perturb(step, context, i, &error);
      perturbed(i);
      if (status == FLATMTL_OK) status = flatmtl_step_restore(step, context, &error);
    }
    return status == FLATMTL_OK ? flatmtl_step_finish(step, context, &error) : status;
  }

  const double hessian[kTasks][kShared][kShared] = {{{2, 0.5, 0}, {0.5, 1, 0.1}, {0, 0.1, 3}},
                                                    {{1, 0, -0.5}, {0, 4, 0}, {-0.5, 0, 2}}};
  std::array<double, kShared> theta{{1.0, -2.0, 0.5}}, saved{}, out{};
  std::array<std::array<double, kOwn>, kTasks> psi{{{{3.0, 4.0}}, {{0.6, -0.8}}}}, psi_saved{}, h{}, t{};
  std::array<std::array<double, kShared>, kTasks> g{}, s{};
  std::array<int64_t, 2> lengths{{1, 2}};
  int64_t own_length = kOwn;
  std::array<void *, 2> theta_pointers{{&theta[0], &theta[1]}}, saved_pointers{{&saved[0], &saved[1]}};
  std::array<void *, 2> out_pointers{{&out[0], &out[1]}};
  std::array<const void *, 4> g_pointers{{&g[0][0], &g[0][1], &g[1][0], &g[1][1]}};
  std::array<const void *, 4> s_pointers{{&s[0][0], &s[0][1], &s[1][0], &s[1][1]}};
  std::array<void *, 2> own_pointers{{psi[0].data(), psi[1].data()}};
  std::array<void *, 2> own_saved_pointers{{psi_saved[0].data(), psi_saved[1].data()}};
  std::array<const void *, 2> own_loss_pointers{{h[0].data(), h[1].data()}};
  std::array<const void *, 2> own_perturbed_pointers{{t[0].data(), t[1].data()}};
  std::array<flatmtl_vector, 2> own_vectors{}, own_saved_vectors{};
  std::array<flatmtl_rows, 2> own_loss_rows{}, own_perturbed_rows{};
  flatmtl_problem problem{};
  flatmtl_settings settings{};
  flatmtl_error error{};
  std::vector<char> memory;
  void *aligned = nullptr;
  size_t size = 0;
  flatmtl_step *step = nullptr;
  Context context{kTasks};
};

double norm(const double *x, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; i++) sum += x[i] * x[i];
  return std::sqrt(sum);
}

}  // namespace

TEST_CASE("A step on quadratics has the closed form: f = rho H Hx / ||Hx||") {
  Quadratic q;
  const auto x = q.theta;
  const auto psi = q.psi;
  REQUIRE(q.init() == FLATMTL_OK);
  REQUIRE(q.run() == FLATMTL_OK);
  const flatmtl_vector out = {FLATMTL_F64, 2, q.lengths.data(), q.out_pointers.data()};
  REQUIRE(flatmtl_step_update(q.step, q.context, &out, &q.error) == FLATMTL_OK);
  REQUIRE(q.theta == x);
  REQUIRE(q.psi == psi);
  flatmtl_record record{};
  REQUIRE(flatmtl_step_record(q.step, &record, &q.error) == FLATMTL_OK);
  double expected[kShared] = {};
  for (int i = 0; i < kTasks; i++) {
    double hx[kShared], f[kShared];
    for (int r = 0; r < kShared; r++) hx[r] = q.g[i][r];
    for (int r = 0; r < kShared; r++) {
      f[r] = 0.0;
      for (int c = 0; c < kShared; c++) f[r] += q.hessian[i][r][c] * hx[c] * 0.3 / norm(hx, kShared);
      expected[r] += hx[r] + f[r];
    }
    REQUIRE(record.norms_loss[i] == Approx(norm(hx, kShared)).epsilon(1e-14));
    REQUIRE(record.norms_flat[i] == Approx(norm(f, kShared)).epsilon(1e-12));
    for (int r = 0; r < kOwn; r++) REQUIRE(q.t[i][r] == Approx(psi[i][r] * (1 + 0.2 / norm(psi[i].data(), kOwn))));
  }
  for (int r = 0; r < kShared; r++) REQUIRE(q.out[r] == Approx(expected[r]).epsilon(1e-13));
  REQUIRE(record.weights_loss[0] == 1.0);
}

TEST_CASE("The displacement has the length that norm says") {
  for (auto kind : {FLATMTL_NORM_SEPARATE, FLATMTL_NORM_JOINT})
    for (int adaptive : {0, 1}) {
      Quadratic q;
      q.settings.norm = kind;
      q.settings.adaptive = adaptive;
      q.settings.rho_task = 0.3;
      const auto x = q.theta;
      const auto psi = q.psi;
      REQUIRE(q.init() == FLATMTL_OK);
      q.losses();
      REQUIRE(flatmtl_step_begin(q.step, q.context, nullptr) == FLATMTL_OK);
      REQUIRE(flatmtl_step_perturb(q.step, q.context, 1, nullptr) == FLATMTL_OK);
      double sum = 0.0;  // of (moved / T)^2, T = |theta| for ASAM
      for (int r = 0; r < kShared; r++) sum += std::pow((q.theta[r] - x[r]) / (adaptive ? std::fabs(x[r]) : 1.0), 2);
      for (int r = 0; r < kOwn; r++)
        sum += std::pow((q.psi[1][r] - psi[1][r]) / (adaptive ? std::fabs(psi[1][r]) : 1.0), 2);
      REQUIRE(std::sqrt(sum) == Approx(0.3 * (kind == FLATMTL_NORM_SEPARATE ? std::sqrt(2.0) : 1.0)).epsilon(1e-12));
      REQUIRE(q.psi[0] == psi[0]);
      REQUIRE(flatmtl_step_restore(q.step, q.context, nullptr) == FLATMTL_OK);
      REQUIRE(q.theta == x);
      REQUIRE(q.psi == psi);
    }
}

TEST_CASE("Every combination mode equals the sum for method sum; rho = 0 needs no perturbed rows") {
  std::array<double, kShared> first{};
  for (auto mode : {FLATMTL_DECOMPOSED, FLATMTL_DIRECT, FLATMTL_SECOND, FLATMTL_EACH}) {
    Quadratic q;
    q.settings.combine = mode;
    REQUIRE(q.init() == FLATMTL_OK);
    REQUIRE(q.run() == FLATMTL_OK);
    const flatmtl_vector out = {FLATMTL_F64, 2, q.lengths.data(), q.out_pointers.data()};
    REQUIRE(flatmtl_step_update(q.step, q.context, &out, nullptr) == FLATMTL_OK);
    if (mode == FLATMTL_DECOMPOSED) first = q.out;
    for (int r = 0; r < kShared; r++) REQUIRE(q.out[r] == Approx(first[r]).epsilon(1e-13));
  }
  Quadratic q;
  q.settings.rho_shared = q.settings.rho_task = 0.0;
  q.problem.shared_perturbed.data = nullptr;
  q.problem.own_perturbed = nullptr;
  REQUIRE(q.init() == FLATMTL_OK);
  q.losses();
  REQUIRE(flatmtl_step_begin(q.step, q.context, nullptr) == FLATMTL_OK);
  REQUIRE(flatmtl_step_perturb(q.step, q.context, 0, nullptr) == FLATMTL_ERROR_ORDER);
  REQUIRE(flatmtl_step_finish(q.step, q.context, nullptr) == FLATMTL_OK);
  REQUIRE(flatmtl_step_update(q.step, q.context, &q.problem.shared_saved, nullptr) == FLATMTL_OK);
  for (int r = 0; r < kShared; r++) REQUIRE(q.saved[r] == Approx(q.g[0][r] + q.g[1][r]));
}

TEST_CASE("Calls out of order are refused") {
  Quadratic q;
  flatmtl_record record{};
  REQUIRE(q.init() == FLATMTL_OK);
  REQUIRE(flatmtl_step_perturb(q.step, q.context, 0, &q.error) == FLATMTL_ERROR_ORDER);
  REQUIRE(flatmtl_step_restore(q.step, q.context, &q.error) == FLATMTL_ERROR_ORDER);
  REQUIRE(flatmtl_step_finish(q.step, q.context, &q.error) == FLATMTL_ERROR_ORDER);
  REQUIRE(flatmtl_step_update(q.step, q.context, &q.problem.shared_saved, &q.error) == FLATMTL_ERROR_ORDER);
  REQUIRE(flatmtl_step_record(q.step, &record, &q.error) == FLATMTL_ERROR_ORDER);
  q.losses();
  REQUIRE(flatmtl_step_begin(q.step, q.context, nullptr) == FLATMTL_OK);
  REQUIRE(flatmtl_step_perturb(q.step, q.context, 2, &q.error) == FLATMTL_ERROR_NUM_TASKS);
  REQUIRE(flatmtl_step_perturb(q.step, q.context, 0, nullptr) == FLATMTL_OK);
  REQUIRE(flatmtl_step_perturb(q.step, q.context, 1, &q.error) == FLATMTL_ERROR_ORDER);
  REQUIRE(flatmtl_step_begin(q.step, q.context, &q.error) == FLATMTL_ERROR_ORDER);
  REQUIRE(flatmtl_step_finish(q.step, q.context, &q.error) == FLATMTL_ERROR_ORDER);
  REQUIRE(flatmtl_step_restore(q.step, q.context, nullptr) == FLATMTL_OK);
  REQUIRE(flatmtl_step_finish(q.step, q.context, &q.error) == FLATMTL_ERROR_ORDER);  // task 1 was not perturbed
  REQUIRE(q.error.row == 1);
}

TEST_CASE("A non-finite gradient names its task and changes nothing") {
  for (int where = 0; where < 4; where++) {
    Quadratic q;
    const auto x = q.theta;
    const auto psi = q.psi;
    REQUIRE(q.init() == FLATMTL_OK);
    if (where < 2) {
      q.losses();
      (where == 0 ? q.g[1][2] : q.h[1][0]) = NAN;
      REQUIRE(flatmtl_step_begin(q.step, q.context, &q.error) == FLATMTL_ERROR_NONFINITE);
    } else {
      q.losses();
      REQUIRE(flatmtl_step_begin(q.step, q.context, nullptr) == FLATMTL_OK);
      for (int i = 0; i < kTasks; i++) {
        REQUIRE(flatmtl_step_perturb(q.step, q.context, i, nullptr) == FLATMTL_OK);
        q.perturbed(i);
        REQUIRE(flatmtl_step_restore(q.step, q.context, nullptr) == FLATMTL_OK);
      }
      (where == 2 ? q.s[1][0] : q.t[1][1]) = INFINITY;
      REQUIRE(flatmtl_step_finish(q.step, q.context, &q.error) == FLATMTL_ERROR_NONFINITE);
    }
    REQUIRE(q.error.row == 1);
    REQUIRE(q.theta == x);
    REQUIRE(q.psi == psi);
    REQUIRE(q.run() == FLATMTL_OK);  // and the next step works
  }
}

TEST_CASE("step_init checks problem and settings") {
  {
    Quadratic q;
    q.settings.rho_shared = -1.0;
    REQUIRE(q.init() == FLATMTL_ERROR_OPTION);
    REQUIRE(std::string(q.error.argument) == "rho_shared");
  }
  {
    Quadratic q;
    q.settings.norm = static_cast<flatmtl_norm>(7);
    REQUIRE(q.init() == FLATMTL_ERROR_NAME);
  }
  {
    Quadratic q;
    q.problem.shared_loss.num_rows = 1;
    REQUIRE(q.init() == FLATMTL_ERROR_MISMATCH);
  }
  {
    Quadratic q;
    q.own_loss_rows[1].dtype = FLATMTL_F32;
    REQUIRE(q.init() == FLATMTL_ERROR_DTYPE);
    REQUIRE(q.error.row == 1);
  }
  {
    Quadratic q;
    q.own_saved_pointers[0] = q.psi[1].data();
    REQUIRE(q.init() == FLATMTL_ERROR_OVERLAP);
  }
  {
    Quadratic q;
    q.size = 100;
    REQUIRE(q.init() == FLATMTL_ERROR_SIZE);
  }
}
