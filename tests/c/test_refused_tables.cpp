// Every segment table of every function: what is wrong with one is refused and named.
#include <string>
#include <vector>

#include "catch.h"
#include "refusals_support.h"

namespace {

// A function, one of its arguments with a segment table, and the valid value of that argument.
struct Table {
  std::string function, argument;
  flatmtl_rows valid;
  std::function<flatmtl_status(const flatmtl_rows &table, flatmtl_error *error)> call;
  bool alone = false;   // the only table of the call: any other one is right too
  bool vector = false;  // without a number of rows
};

std::vector<Table> tables(World &w) {
  const flatmtl_context *c = w.context;
  Numbers &n = w.n;
  const flatmtl_vector *out = &w.target;
  const flatmtl_rows out_row = {FLATMTL_F32, 1, 2, w.out.lengths.data(), w.out.pointers.data()};
  std::vector<Table> all = {
      {"sq_norms", "rows", w.g_rows,
       [=, &n](const flatmtl_rows &t, flatmtl_error *e) { return flatmtl_sq_norms(c, &t, nullptr, 0, n.result, e); },
       true},
      {"sq_norms", "params", w.saved_rows,
       [=, &n, &w](const flatmtl_rows &t, flatmtl_error *e) {
         return flatmtl_sq_norms(c, &w.g_rows, &t, 0, n.result, e);
       }},
      {"gramian", "rows", w.g_rows,
       [=, &n](const flatmtl_rows &t, flatmtl_error *e) { return flatmtl_gramian(c, &t, n.result, e); }, true},
      {"gramian_pair", "loss_rows", w.g_rows,
       [=, &n, &w](const flatmtl_rows &t, flatmtl_error *e) {
         return flatmtl_gramian_pair(c, &t, &w.s_rows, 1, n.result, e);
       }},
      {"gramian_pair", "perturbed_rows", w.s_rows,
       [=, &n, &w](const flatmtl_rows &t, flatmtl_error *e) {
         return flatmtl_gramian_pair(c, &w.g_rows, &t, 1, n.result, e);
       }},
      {"combine", "rows", w.g_rows,
       [=, &n](const flatmtl_rows &t, flatmtl_error *e) { return flatmtl_combine(c, &t, n.weights, out, e); }},
      {"combine", "out", out_row,
       [=, &n, &w](const flatmtl_rows &t, flatmtl_error *e) {
         const flatmtl_vector v = as_vector(t);
         return flatmtl_combine(c, &w.g_rows, n.weights, &v, e);
       },
       false, true},
      {"combine_pair", "loss_rows", w.g_rows,
       [=, &n, &w](const flatmtl_rows &t, flatmtl_error *e) {
         return flatmtl_combine_pair(c, &t, &w.s_rows, n.weights, n.flat, out, e);
       }},
      {"combine_pair", "perturbed_rows", w.s_rows,
       [=, &n, &w](const flatmtl_rows &t, flatmtl_error *e) {
         return flatmtl_combine_pair(c, &w.g_rows, &t, n.weights, n.flat, out, e);
       }},
      {"combine_pair", "out", out_row,
       [=, &n, &w](const flatmtl_rows &t, flatmtl_error *e) {
         const flatmtl_vector v = as_vector(t);
         return flatmtl_combine_pair(c, &w.g_rows, &w.s_rows, n.weights, n.flat, &v, e);
       },
       false, true},
      {"perturb", "params", out_row,
       [=, &n, &w](const flatmtl_rows &t, flatmtl_error *e) {
         const flatmtl_vector v = as_vector(t);
         return flatmtl_perturb(c, &v, &w.saved_rows, &w.row, n.scale, 0, 0, e);
       },
       false, true},
      {"perturb", "saved", w.saved_rows,
       [=, &n, &w](const flatmtl_rows &t, flatmtl_error *e) {
         return flatmtl_perturb(c, out, &t, &w.row, n.scale, 0, 0, e);
       }},
      {"perturb", "gradient", w.row,
       [=, &n, &w](const flatmtl_rows &t, flatmtl_error *e) {
         return flatmtl_perturb(c, out, &w.saved_rows, &t, n.scale, 0, 0, e);
       }},
      {"copy", "to", out_row,
       [=, &w](const flatmtl_rows &t, flatmtl_error *e) {
         const flatmtl_vector v = as_vector(t);
         return flatmtl_copy(c, &v, &w.saved_rows, e);
       },
       false, true},
      {"copy", "from", w.saved_rows,
       [=](const flatmtl_rows &t, flatmtl_error *e) { return flatmtl_copy(c, out, &t, e); }},
      {"combine_buffers", "buffers", w.memory_rows,
       [=, &n](const flatmtl_rows &t, flatmtl_error *e) {
         const flatmtl_buffers b = as_buffers(t);
         return flatmtl_combine_buffers(c, &b, n.weights, out, e);
       }},
      {"combine_buffers", "out", out_row,
       [=, &n, &w](const flatmtl_rows &t, flatmtl_error *e) {
         const flatmtl_vector v = as_vector(t);
         return flatmtl_combine_buffers(c, &w.buffers, n.weights, &v, e);
       },
       false, true},
  };
  // The functions on mixed rows, each with its own way to be called.
  using Call = std::function<flatmtl_status(const flatmtl_mixed_rows *, const flatmtl_buffers *, const flatmtl_vector *,
                                            flatmtl_error *)>;
  struct Mixed {
    std::string name;
    bool buffers, out;
    Call call;
  };
  const std::vector<Mixed> mixed = {
      {"moving_average", true, false,
       [=, &n](auto *x, auto *b, auto *, auto *e) { return flatmtl_moving_average(c, x, n.keep, b, e); }},
      {"excess", true, false,
       [=, &n](auto *x, auto *b, auto *, auto *e) { return flatmtl_excess(c, x, b, n.result, e); }},
      {"cross_gramian", false, false,
       [=, &n, &w](auto *x, auto *, auto *, auto *e) { return flatmtl_cross_gramian(c, x, &w.x, n.result, e); }},
      {"cross_gramian, others", false, false,
       [=, &n, &w](auto *x, auto *, auto *, auto *e) { return flatmtl_cross_gramian(c, &w.x, x, n.result, e); }},
      {"graddrop", false, true,
       [=, &n](auto *x, auto *, auto *v, auto *e) { return flatmtl_graddrop(c, x, n.leak, 0, 0, 0, 0, v, e); }},
      {"buffer_update", true, true,
       [=, &n](auto *x, auto *b, auto *v, auto *e) {
         return flatmtl_buffer_update(c, FLATMTL_BUFFER_MOCO, nullptr, 0, x, n.losses, 0, b, n.state, n.weights, v, e);
       }},
  };
  for (const Mixed &m : mixed) {
    const Call call = m.call;
    all.push_back({m.name, "loss_rows", w.g_rows, [=, &w](const flatmtl_rows &t, flatmtl_error *e) {
                     const flatmtl_mixed_rows x = w.mixed(&t);
                     return call(&x, &w.buffers, out, e);
                   }});
    all.push_back({m.name, "perturbed_rows", w.s_rows, [=, &w](const flatmtl_rows &t, flatmtl_error *e) {
                     const flatmtl_mixed_rows x = w.mixed(&w.g_rows, &t);
                     return call(&x, &w.buffers, out, e);
                   }});
    if (m.buffers)
      all.push_back({m.name, "buffers", w.memory_rows, [=, &w](const flatmtl_rows &t, flatmtl_error *e) {
                       const flatmtl_buffers b = as_buffers(t);
                       return call(&w.x, &b, out, e);
                     }});
    if (m.out)
      all.push_back({m.name, "out", out_row,
                     [=, &w](const flatmtl_rows &t, flatmtl_error *e) {
                       const flatmtl_vector v = as_vector(t);
                       return call(&w.x, &w.buffers, &v, e);
                     },
                     false, true});
  }
  // The tables of a step.
  const auto init = [&w](const flatmtl_problem &problem, flatmtl_error *e) {
    flatmtl_step *step = nullptr;
    return flatmtl_step_init(w.room, w.step_bytes, &problem, &w.settings, &step, e);
  };
  const struct {
    const char *name;
    flatmtl_vector flatmtl_problem::*field;
  } vectors[] = {{"shared", &flatmtl_problem::shared}, {"shared_saved", &flatmtl_problem::shared_saved}};
  for (const auto &v : vectors)
    all.push_back({"step_init", v.name, v.field == &flatmtl_problem::shared ? w.params.rows() : w.saved_rows,
                   [=, &w](const flatmtl_rows &t, flatmtl_error *e) {
                     flatmtl_problem problem = w.problem;
                     problem.*v.field = as_vector(t);
                     return init(problem, e);
                   },
                   false, true});
  const struct {
    const char *name;
    flatmtl_rows flatmtl_problem::*field;
  } families[] = {{"shared_loss", &flatmtl_problem::shared_loss},
                  {"shared_perturbed", &flatmtl_problem::shared_perturbed}};
  for (const auto &f : families)
    all.push_back({"step_init", f.name, w.problem.*f.field, [=, &w](const flatmtl_rows &t, flatmtl_error *e) {
                     flatmtl_problem problem = w.problem;
                     problem.*f.field = t;
                     return init(problem, e);
                   }});
  return all;
}

// What may be wrong with a table.
struct Fault {
  const char *what;
  flatmtl_status status;
  int64_t row, segment;
  bool against_another;  // wrong only beside another table
  std::function<void(flatmtl_rows *)> spoil;
};

const int64_t negative_lengths[] = {5, -3}, huge_lengths[] = {5, INT64_MAX}, shorter_lengths[] = {5, 2};

std::vector<Fault> faults(std::vector<const void *> *hole) {
  return {
      {"unknown dtype", FLATMTL_ERROR_DTYPE, -1, -1, false,
       [](flatmtl_rows *t) { t->dtype = static_cast<flatmtl_dtype>(4); }},
      {"negative dtype", FLATMTL_ERROR_DTYPE, -1, -1, false,
       [](flatmtl_rows *t) { t->dtype = static_cast<flatmtl_dtype>(-1); }},
      {"-1 segments", FLATMTL_ERROR_SIZE, -1, -1, false, [](flatmtl_rows *t) { t->num_segments = -1; }},
      {"too many segments", FLATMTL_ERROR_SIZE, -1, -1, false, [](flatmtl_rows *t) { t->num_segments = INT64_MAX; }},
      {"negative length", FLATMTL_ERROR_SIZE, -1, 1, false, [](flatmtl_rows *t) { t->lengths = negative_lengths; }},
      {"huge length", FLATMTL_ERROR_SIZE, -1, 1, false, [](flatmtl_rows *t) { t->lengths = huge_lengths; }},
      {"no lengths", FLATMTL_ERROR_NULL, -1, -1, false, [](flatmtl_rows *t) { t->lengths = nullptr; }},
      {"no data", FLATMTL_ERROR_NULL, -1, -1, false, [](flatmtl_rows *t) { t->data = nullptr; }},
      {"a segment is NULL", FLATMTL_ERROR_NULL, 0, 1, false,
       [hole](flatmtl_rows *t) {
         hole->assign(t->data, t->data + t->num_rows * t->num_segments);
         (*hole)[1] = nullptr;
         t->data = hole->data();
       }},
      {"another length", FLATMTL_ERROR_MISMATCH, -1, 1, true, [](flatmtl_rows *t) { t->lengths = shorter_lengths; }},
      {"fewer segments", FLATMTL_ERROR_MISMATCH, -1, -1, true, [](flatmtl_rows *t) { t->num_segments = 1; }},
      {"another dtype", FLATMTL_ERROR_DTYPE, -1, -1, true, [](flatmtl_rows *t) { t->dtype = FLATMTL_F64; }},
  };
}

}  // namespace

TEST_CASE("Every segment table that is wrong is refused by every function that reads it", "[errors]") {
  World w;
  std::vector<const void *> hole;
  const std::vector<char> before = w.bytes();
  for (const Table &table : tables(w)) {
    for (const Fault &fault : faults(&hole)) {
      if (fault.against_another && table.alone) continue;
      INFO("flatmtl_" << table.function << " " << table.argument << ": " << fault.what);
      flatmtl_rows bad = table.valid;
      fault.spoil(&bad);
      flatmtl_error error{};
      CHECK(table.call(bad, &error) == fault.status);
      CHECK(error.status == fault.status);
      CHECK(error.segment == fault.segment);
      if (!fault.against_another) {  // there the other table may be the one that is named
        CHECK(std::string(error.argument) == table.argument);
        CHECK(error.row == fault.row);
      }
      CHECK(table.call(bad, nullptr) == fault.status);
      CHECK(w.bytes() == before);
    }
    if (table.vector) continue;
    for (const int32_t count : {0, -1, FLATMTL_MAX_TASKS + 1, INT32_MIN}) {
      INFO("flatmtl_" << table.function << " " << table.argument << " of " << count << " rows");
      flatmtl_rows bad = table.valid;
      bad.num_rows = count;
      flatmtl_error error{};
      CHECK(table.call(bad, &error) == FLATMTL_ERROR_NUM_TASKS);
      CHECK(std::string(error.argument) == table.argument);
      CHECK(error.value == count);
    }
    if (table.alone) continue;
    if (table.argument == "rows" || table.argument == "loss_rows" || table.function == "combine_buffers") continue;
    INFO("flatmtl_" << table.function << " " << table.argument << " of another number of rows");
    flatmtl_rows bad = table.valid;
    bad.num_rows = bad.num_rows == 1 ? 2 : 1;
    flatmtl_error error{};
    CHECK(table.call(bad, &error) == FLATMTL_ERROR_MISMATCH);
    CHECK(std::string(error.argument) == table.argument);
    CHECK(w.bytes() == before);
  }
}
