// NULL, counts, names and numbers out of range, where test_errors.cpp does not look: buffer methods, states,
// weightings.
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "catch.h"
#include "refusals_support.h"

TEST_CASE("Pointers of the buffer methods and of stateful aggregators are named when they are NULL", "[errors]") {
  World w;
  const flatmtl_context *c = w.context;
  Numbers &n = w.n;
  const auto moco = FLATMTL_BUFFER_MOCO;
  flatmtl_buffer_method method = moco;
  int32_t count = 8;
  int64_t doubles = 0;
  const std::vector<Call> all = {
      {"state_size",
       {"count"},
       [&](int m, flatmtl_error *e) { return flatmtl_state_size(FLATMTL_GRADVAC, 2, unless(m == 0, &doubles), e); }},
      {"step_state_size",
       {"settings", "count"},
       [&](int m, flatmtl_error *e) {
         return flatmtl_step_state_size(unless(m == 0, &w.settings), 2, unless(m == 1, &doubles), e);
       }},
      {"weights",
       {"context", "gramian", "state", "weights"},
       [&](int m, flatmtl_error *e) {
         return flatmtl_weights(unless(m == 0, c), FLATMTL_GRADVAC, nullptr, 0, 2, unless(m == 1, n.gramian),
                                unless(m == 2, n.state), unless(m == 3, n.weights), e);
       }},
      {"buffer_method_by_name",
       {"name", "method"},
       [&](int m, flatmtl_error *e) {
         return flatmtl_buffer_method_by_name(unless(m == 0, "moco"), unless(m == 1, &method), e);
       }},
      {"buffer_method_defaults",
       {"num_options"},
       [&](int m, flatmtl_error *e) {
         count = 8;
         return flatmtl_buffer_method_defaults(moco, 2, n.options, unless(m == 0, &count), e);
       }},
      {"buffer_factors",
       {"losses", "sq_norms", "state", "factors", "keep"},
       [&](int m, flatmtl_error *e) {
         return flatmtl_buffer_factors(moco, nullptr, 0, 2, unless(m == 0, n.losses), unless(m == 1, n.squares),
                                       unless(m == 2, n.state), unless(m == 3, n.factors), unless(m == 4, n.keep), e);
       }},
      {"buffer_weights",
       {"sums", "state", "weights"},
       [&](int m, flatmtl_error *e) {
         return flatmtl_buffer_weights(c, moco, nullptr, 0, 2, unless(m == 0, n.gramian), unless(m == 1, n.state),
                                       unless(m == 2, n.weights), e);
       }},
      {"moving_average",
       {"context", "rows", "keep", "buffers"},
       [&](int m, flatmtl_error *e) {
         return flatmtl_moving_average(unless(m == 0, c), unless(m == 1, &w.x), unless(m == 2, n.keep),
                                       unless(m == 3, &w.buffers), e);
       }},
      {"excess",
       {"context", "rows", "buffers", "excess"},
       [&](int m, flatmtl_error *e) {
         return flatmtl_excess(unless(m == 0, c), unless(m == 1, &w.x), unless(m == 2, &w.buffers),
                               unless(m == 3, n.result), e);
       }},
      {"cross_gramian",
       {"context", "rows", "others", "gramian"},
       [&](int m, flatmtl_error *e) {
         return flatmtl_cross_gramian(unless(m == 0, c), unless(m == 1, &w.x), unless(m == 2, &w.x),
                                      unless(m == 3, n.result), e);
       }},
      {"graddrop",
       {"context", "rows", "out"},
       [&](int m, flatmtl_error *e) {
         return flatmtl_graddrop(unless(m == 0, c), unless(m == 1, &w.x), nullptr, 0, 0, 0, 0,
                                 unless(m == 2, &w.target), e);
       }},
      {"combine_buffers",
       {"context", "buffers", "weights", "out"},
       [&](int m, flatmtl_error *e) {
         return flatmtl_combine_buffers(unless(m == 0, c), unless(m == 1, &w.buffers), unless(m == 2, n.weights),
                                        unless(m == 3, &w.target), e);
       }},
      {"buffer_update",
       {"context", "rows", "losses", "buffers", "state", "out"},
       [&](int m, flatmtl_error *e) {
         return flatmtl_buffer_update(unless(m == 0, c), moco, nullptr, 0, unless(m == 1, &w.x),
                                      unless(m == 2, n.losses), 0, unless(m == 3, &w.buffers), unless(m == 4, n.state),
                                      nullptr, unless(m == 5, &w.target), e);
       }},
  };
  for (const Call &call : all) {
    const std::vector<char> before = w.bytes();
    check_null(call);
    CHECK(w.bytes() == before);
    CHECK(call.call(-1, nullptr) >= 0);
  }
  check_refused(w, {{"weights without a context", FLATMTL_ERROR_NULL, "context",
                     [&](flatmtl_error *e) {
                       return flatmtl_buffer_weights(nullptr, moco, nullptr, 0, 2, n.gramian, n.state, n.weights, e);
                     }},
                    {"options announced, but NULL", FLATMTL_ERROR_NULL, "options", [&](flatmtl_error *e) {
                       return flatmtl_buffer_weights(c, moco, nullptr, 6, 2, n.gramian, n.state, n.weights, e);
                     }}});
  for (flatmtl_vector *own : {w.own, w.own_saved}) {
    flatmtl_problem problem = w.problem;
    (own == w.own ? problem.own : problem.own_saved) = nullptr;
    flatmtl_step *step = nullptr;
    CHECK(flatmtl_step_init(w.room, w.step_bytes, &problem, &w.settings, &step, nullptr) == FLATMTL_ERROR_NULL);
    CHECK(step == nullptr);
  }
  for (flatmtl_rows *own : {w.own_loss, w.own_perturbed}) {
    flatmtl_problem problem = w.problem;
    (own == w.own_loss ? problem.own_loss : problem.own_perturbed) = nullptr;
    flatmtl_step *step = nullptr;
    CHECK(flatmtl_step_init(w.room, w.step_bytes, &problem, &w.settings, &step, nullptr) == FLATMTL_ERROR_NULL);
    flatmtl_rows bad = own[1];
    bad.num_segments = -1;
    std::swap(own[1], bad);
    flatmtl_error error{};
    CHECK(flatmtl_step_init(w.room, w.step_bytes, &w.problem, &w.settings, &step, &error) == FLATMTL_ERROR_SIZE);
    CHECK(error.row == 1);
    std::swap(own[1], bad);
    CHECK(step == nullptr);
  }
}

TEST_CASE("Counts, names and numbers out of range are refused by the buffer methods and the weightings", "[errors]") {
  World w;
  const flatmtl_context *c = w.context;
  Numbers &n = w.n;
  const auto moco = FLATMTL_BUFFER_MOCO;
  int32_t count = 0;
  int64_t doubles = 0;
  std::vector<Refusal> refusals;
  const auto refused = [&](const std::string &what, flatmtl_status status, const std::string &argument,
                           std::function<flatmtl_status(flatmtl_error *)> call) {
    refusals.push_back({what, status, argument, std::move(call)});
  };
  // Each as a function of the method's number, the number of tasks and the number of options.
  struct Sized {
    std::string name, number;
    std::function<flatmtl_status(int number, int32_t tasks, int32_t options, flatmtl_error *)> call;
    int valid;
    bool has_options;
  };
  const std::vector<Sized> sized = {
      {"weights", "method",
       [=, &n](int m, int32_t k, int32_t o, flatmtl_error *e) {
         return flatmtl_weights(c, static_cast<flatmtl_method>(m), n.options, o, k, n.gramian, n.state, n.weights, e);
       },
       FLATMTL_GRADVAC, true},
      {"method_defaults", "method",
       [=, &n, &count](int m, int32_t k, int32_t, flatmtl_error *e) {
         return flatmtl_method_defaults(static_cast<flatmtl_method>(m), k, n.options, &count, e);
       },
       FLATMTL_FIXED, false},
      {"state_size", "method",
       [=, &doubles](int m, int32_t k, int32_t, flatmtl_error *e) {
         return flatmtl_state_size(static_cast<flatmtl_method>(m), k, &doubles, e);
       },
       FLATMTL_GRADVAC, false},
      {"step_state_size", "method",
       [=, &w, &n, &doubles](int m, int32_t k, int32_t o, flatmtl_error *e) {
         flatmtl_settings settings = w.settings;
         settings.method = static_cast<flatmtl_method>(m);
         settings.options = n.options;
         settings.num_options = o;
         return flatmtl_step_state_size(&settings, k, &doubles, e);
       },
       FLATMTL_GRADVAC, true},
      {"step_weights", "method",
       [=, &w, &n](int m, int32_t k, int32_t o, flatmtl_error *e) {
         flatmtl_settings settings = w.settings;
         settings.method = static_cast<flatmtl_method>(m);
         settings.options = n.options;
         settings.num_options = o;
         return flatmtl_step_weights(c, &settings, k, n.pair, nullptr, n.weights, n.flat, nullptr, e);
       },
       FLATMTL_CAGRAD, true},
      {"buffer_method_defaults", "method",
       [=, &n, &count](int m, int32_t k, int32_t, flatmtl_error *e) {
         return flatmtl_buffer_method_defaults(static_cast<flatmtl_buffer_method>(m), k, n.options, &count, e);
       },
       moco, false},
      {"buffer_state_size", "method",
       [=, &doubles](int m, int32_t k, int32_t, flatmtl_error *e) {
         return flatmtl_buffer_state_size(static_cast<flatmtl_buffer_method>(m), k, &doubles, nullptr, e);
       },
       moco, false},
      {"buffer_factors", "method",
       [=, &n](int m, int32_t k, int32_t o, flatmtl_error *e) {
         return flatmtl_buffer_factors(static_cast<flatmtl_buffer_method>(m), n.options, o, k, n.losses, n.squares,
                                       n.state, n.factors, n.keep, e);
       },
       moco, true},
      {"buffer_weights", "method",
       [=, &n](int m, int32_t k, int32_t o, flatmtl_error *e) {
         return flatmtl_buffer_weights(c, static_cast<flatmtl_buffer_method>(m), n.options, o, k, n.gramian, n.state,
                                       n.weights, e);
       },
       moco, true},
      {"weighting_defaults", "weighting",
       [=, &n, &count](int m, int32_t k, int32_t, flatmtl_error *e) {
         return flatmtl_weighting_defaults(static_cast<flatmtl_weighting>(m), k, n.options, &count, e);
       },
       FLATMTL_WEIGHTING_FAMO, false},
      {"weighting_state_size", "weighting",
       [=, &doubles](int m, int32_t k, int32_t, flatmtl_error *e) {
         return flatmtl_weighting_state_size(static_cast<flatmtl_weighting>(m), k, &doubles, e);
       },
       FLATMTL_WEIGHTING_FAMO, false},
      {"loss_weights", "weighting",
       [=, &n](int m, int32_t k, int32_t o, flatmtl_error *e) {
         return flatmtl_loss_weights(c, static_cast<flatmtl_weighting>(m), n.options, o, k, n.losses, nullptr, n.state,
                                     n.weights, e);
       },
       FLATMTL_WEIGHTING_FAMO, true},
      {"loss_observe", "weighting",
       [=, &n](int m, int32_t k, int32_t o, flatmtl_error *e) {
         return flatmtl_loss_observe(c, static_cast<flatmtl_weighting>(m), n.options, o, k, n.losses, n.after, n.state,
                                     e);
       },
       FLATMTL_WEIGHTING_FAMO, true},
  };
  for (const Sized &f : sized) {
    for (const int number : {-1, 1000, INT32_MAX, INT32_MIN})
      refused(f.name + " of number " + std::to_string(number), FLATMTL_ERROR_NAME, f.number,
              [=](flatmtl_error *e) { return f.call(number, 2, 0, e); });
    for (const int32_t tasks : {0, -1, FLATMTL_MAX_TASKS + 1, INT32_MIN, INT32_MAX})
      refused(f.name + " of " + std::to_string(tasks) + " tasks", FLATMTL_ERROR_NUM_TASKS, "num_tasks",
              [=](flatmtl_error *e) { return f.call(f.valid, tasks, 0, e); });
    if (f.has_options) {
      refused(f.name + " with -1 options", FLATMTL_ERROR_SIZE, "num_options",
              [=](flatmtl_error *e) { return f.call(f.valid, 2, -1, e); });
      refused(f.name + " with 8 options", FLATMTL_ERROR_OPTION, "num_options",
              [=](flatmtl_error *e) { return f.call(f.valid, 2, 8, e); });
    } else if (f.name.find("defaults") != std::string::npos) {
      refused(f.name + " without room", FLATMTL_ERROR_SIZE, "num_options",
              [=](flatmtl_error *e) { return f.call(f.valid, 2, 0, e); });
    }
  }
  const auto update = [=, &w, &n](int method, flatmtl_error *e) {
    return flatmtl_buffer_update(c, static_cast<flatmtl_buffer_method>(method), nullptr, 0, &w.x, n.losses, 0,
                                 &w.buffers, n.state, nullptr, &w.target, e);
  };
  for (const int number : {-1, 1000, static_cast<int>(FLATMTL_BUFFER_SDMGRAD)})
    refused("update by " + std::to_string(number), FLATMTL_ERROR_NAME, "method",
            [=](flatmtl_error *e) { return update(number, e); });
  refused("weights of graddrop", FLATMTL_ERROR_NAME, "method", [=, &n](flatmtl_error *e) {
    return flatmtl_buffer_weights(c, FLATMTL_BUFFER_GRADDROP, nullptr, 0, 2, n.gramian, n.state, n.weights, e);
  });
  const std::string names[] = {"seed", "draw", "call", "position"};
  for (size_t i = 0; i < 4; i++)
    refused("graddrop with " + names[i] + " -1", FLATMTL_ERROR_OPTION, names[i], [=, &w](flatmtl_error *e) {
      const auto value = [&](size_t j) { return static_cast<int64_t>(j == i ? -1 : 0); };
      return flatmtl_graddrop(c, &w.x, nullptr, value(0), value(1), value(2), value(3), &w.target, e);
    });
  for (const int combine : {-1, 4})
    refused("state of combination " + std::to_string(combine), FLATMTL_ERROR_NAME, "settings->combine",
            [=, &w, &doubles](flatmtl_error *e) {
              flatmtl_settings settings = w.settings;
              settings.combine = static_cast<flatmtl_combination>(combine);
              return flatmtl_step_state_size(&settings, 2, &doubles, e);
            });
  for (const char *name : {"", "MoCo", "moco ", "mgda"})
    refused(std::string("buffer method '") + name + "'", FLATMTL_ERROR_NAME, "name", [=](flatmtl_error *e) {
      flatmtl_buffer_method method = moco;
      return flatmtl_buffer_method_by_name(name, &method, e);
    });
  refused("a step in memory off by 8 bytes", FLATMTL_ERROR_SIZE, "memory", [&w](flatmtl_error *e) {
    flatmtl_step *step = nullptr;
    return flatmtl_step_init(w.room + 8, w.step_bytes, &w.problem, &w.settings, &step, e);
  });
  flatmtl_context off = w.context.value;
  off.workspace = static_cast<char *>(off.workspace) + 8;
  refused("a workspace off by 8 bytes", FLATMTL_ERROR_SIZE, "workspace",
          [=, &w, &n](flatmtl_error *e) { return flatmtl_moving_average(&off, &w.x, n.keep, &w.buffers, e); });
  check_refused(w, refusals);
  CHECK(flatmtl_buffer_method_name(static_cast<flatmtl_buffer_method>(-1)) == nullptr);
  CHECK(std::string(flatmtl_version()) == std::to_string(FLATMTL_VERSION_MAJOR) + "." +
                                              std::to_string(FLATMTL_VERSION_MINOR) + "." +
                                              std::to_string(FLATMTL_VERSION_PATCH));
}

TEST_CASE("Numbers that are not finite are refused before a buffer method has changed anything", "[errors]") {
  const auto nonfinite = FLATMTL_ERROR_NONFINITE;
  for (const int method : {1, 2, 3}) {
    World w;
    const auto update = [&](const flatmtl_mixed_rows *x, flatmtl_error *e) {
      return flatmtl_buffer_update(w.context, static_cast<flatmtl_buffer_method>(method), nullptr, 0, x, w.n.losses, 0,
                                   &w.buffers, w.n.state, w.n.weights, &w.target, e);
    };
    int64_t count = 0;
    REQUIRE(flatmtl_buffer_state_size(static_cast<flatmtl_buffer_method>(method), 2, &count, nullptr, nullptr) ==
            FLATMTL_OK);
    for (int64_t i = 0; i < count; i++) {  // the last vector of the state too
      w.n.state[i] = i % 2 ? NAN : INFINITY;
      check_refused(
          w, {{"state " + std::to_string(i), nonfinite, "state", [&](flatmtl_error *e) { return update(&w.x, e); }}});
      w.n.state[i] = 0.0;
    }
    // Finite rows, too long for buffers of F32.
    double large[2] = {1.0, 1e100};
    const flatmtl_mixed_rows x = {&w.g_rows, nullptr, large, nullptr};
    if (method != FLATMTL_BUFFER_MOCO)  // which normalizes them
      check_refused(w, {{"rows beyond F32", nonfinite, "rows", [&](flatmtl_error *e) { return update(&x, e); }}});
    if (method == FLATMTL_BUFFER_DB_MTL) {
      w.n.losses[1] = 1e-300;
      check_refused(w,
                    {{"divided by a tiny loss", nonfinite, "rows", [&](flatmtl_error *e) { return update(&w.x, e); }}});
      w.n.losses[1] = 2.0;
    }
    if (method == FLATMTL_BUFFER_MOCO) {
      w.n.losses[1] = 1e300;
      check_refused(w, {{"times a huge loss", nonfinite, "rows", [&](flatmtl_error *e) { return update(&w.x, e); }}});
      w.n.losses[1] = 2.0;
    }
    large[1] = NAN;
    check_refused(w, {{"a factor", nonfinite, "loss_factors", [&](flatmtl_error *e) { return update(&x, e); }}});
    CHECK(update(&w.x, nullptr) == FLATMTL_OK);
  }
}
