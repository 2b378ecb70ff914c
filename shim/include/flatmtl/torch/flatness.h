// flatness.h - which flatness mode, and its options.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "method_options.h"

namespace flatmtl {

// Where the perturbed gradients of a step are taken. g_i and h_i are the gradients of task i's loss with respect to the
// shared parameters and its own ones, s_i and t_i those at the perturbed point, f_i = s_i - g_i; g and s without an
// index are sums over the tasks. Equations, papers and costs: docs/flatness.md and the Python classes of these names.
// An immutable value; a string converts to one.
//
//   flatmtl::FlatMTLOptions().flat("sam")
//   flatmtl::FlatMTLOptions().flat(flatmtl::Flatness::gsam(0.2))
class Flatness {
 public:
  enum class Mode { fmtl, sam, asam, gsam, wsam, fsam, looksam, samo, sgsu };

  // A mode by name with its default options. std::invalid_argument for a name that is none, and for "mtcool".
  Flatness(const char *name) : Flatness(std::string(name)) {}              // NOLINT(google-explicit-constructor)
  Flatness(const std::string &name) : Flatness(with_defaults_of(name)) {}  // NOLINT(google-explicit-constructor)

  // F-MTL: one point a task, along g_i. With every = k > 1 a task's perturbed pass is made in every k-th step alone; in
  // between f_i is the last one's component orthogonal to g_i, scaled with ||g_i||, or, with alpha >= 0, to the length
  // alpha ||g_i||. Keeps one row of P numbers a task.
  static Flatness fmtl(int64_t every = 1, std::optional<double> alpha = std::nullopt) {
    if (alpha) check_number("FMTL", "alpha", *alpha, "None or a finite number >= 0");
    return Flatness(Mode::fmtl, {{"alpha", alpha}}, checked_every("FMTL", every));
  }
  // SAM: one point for all tasks, along g.
  static Flatness sam() { return Flatness(Mode::sam, {}); }
  // SAM with adaptive = true and, unless it is given, eta = 0.01.
  static Flatness asam() { return Flatness(Mode::asam, {}); }
  // s less alpha >= 0 times the component of g orthogonal to it.
  static Flatness gsam(double alpha = 0.4) {
    check_number("GSAM", "alpha", alpha);
    return Flatness(Mode::gsam, {{"alpha", alpha}});
  }
  // f_i times gamma / (1 - gamma), gamma in [0, 1).
  static Flatness wsam(double gamma = 0.9) {
    detail::check_option("WSAM", "gamma", gamma, gamma >= 0.0 && gamma < 1.0, "in [0, 1)");
    return Flatness(Mode::wsam, {{"gamma", gamma}});
  }
  // One point along g - sigma m, m the moving average of g with lmbda in [0, 1]. Keeps P numbers.
  static Flatness fsam(double sigma = 1.0, double lmbda = 0.9) {
    check_number("FSAM", "sigma", sigma);
    check_unit("FSAM", "lmbda", lmbda);
    return Flatness(Mode::fsam, {{"sigma", sigma}, {"lmbda", lmbda}});
  }
  // SAM every so many steps; in between the component of s orthogonal to g, of the length alpha ||g||. Keeps one row of
  // P numbers a task.
  static Flatness looksam(int64_t every = 5, double alpha = 0.7) {
    check_number("LookSAM", "alpha", alpha);
    return Flatness(Mode::looksam, {{"alpha", alpha}}, checked_every("LookSAM", every));
  }
  // One point a task, along alpha g + (1 - alpha) times a guess at g_i from two losses at a distance of mu > 0, alpha
  // in [0, 1].
  static Flatness samo(double alpha = 0.5, double mu = 0.01) {
    check_unit("SAMO", "alpha", alpha);
    detail::check_option("SAMO", "mu", mu, mu > 0.0 && std::isfinite(mu), "a finite number > 0");
    return Flatness(Mode::samo, {{"alpha", alpha}, {"mu", mu}});
  }
  // One point a task: theta - inner_lr g_i, inner_lr >= 0. Does not use rho.
  static Flatness sgsu(double inner_lr = 0.01) {
    check_number("SGSU", "inner_lr", inner_lr);
    return Flatness(Mode::sgsu, {{"inner_lr", inner_lr}});
  }

  Mode mode() const { return mode_; }
  std::string name() const { return names(mode_).first; }
  // Steps from one perturbed pass to the next; 1 in modes without that option.
  int64_t every() const { return every_.value_or(1); }
  // One of the numbers above by its name; nothing where it is unset.
  std::optional<double> option(const std::string &name) const {
    for (const auto &[key, value] : options_)
      if (key == name) return value;
    throw std::invalid_argument("flatness mode " + detail::quoted(this->name()) + " has no option " + name);
  }

  // This mode with another `every`. std::invalid_argument if it has no such option.
  Flatness with_every(int64_t every) const {
    if (!every_)
      throw std::invalid_argument("flatness mode " + detail::quoted(name()) + " has no option every, which is " +
                                  std::to_string(every));
    Flatness result = *this;
    result.every_ = checked_every(names(mode_).second, every);
    return result;
  }

  // Whether the perturbed points depend on rho, so that rho = 0 means no perturbed passes.
  bool uses_rho() const { return mode_ != Mode::sgsu; }
  // Whether a step leaves something for the next.
  bool has_state() const { return mode_ == Mode::fsam || mode_ == Mode::looksam || every() > 1; }
  // Whether the g_i are needed one by one; if not, one backward of their sum does.
  bool needs_task_gradients(const std::string &combine) const {
    switch (mode_) {
      case Mode::sam:
      case Mode::asam:
      case Mode::fsam:
      case Mode::samo:
        return combine != "direct";
      default:
        return true;
    }
  }
  // What `combine` is where it is unset.
  const char *default_combine() const { return mode_ == Mode::samo || mode_ == Mode::sgsu ? "direct" : "decomposed"; }

  // As Python writes it: FMTL(every=2, alpha=None).
  std::string text() const {
    std::string result = every_ ? "every=" + std::to_string(*every_) : "";
    for (const auto &[key, value] : options_)
      result += (result.empty() ? "" : ", ") + key + "=" + (value ? detail::text(*value) : "None");
    return names(mode_).second + ("(" + result + ")");
  }

 private:
  using Options = std::vector<std::pair<std::string, std::optional<double>>>;

  Flatness(Mode mode, Options options, std::optional<int64_t> every = std::nullopt)
      : mode_(mode), options_(std::move(options)), every_(every) {}

  // The name of a mode, and of its class in Python. Null pointers past the last.
  static std::pair<const char *, const char *> names(Mode mode) {
    switch (mode) {
      case Mode::fmtl:
        return {"fmtl", "FMTL"};
      case Mode::sam:
        return {"sam", "SAM"};
      case Mode::asam:
        return {"asam", "ASAM"};
      case Mode::gsam:
        return {"gsam", "GSAM"};
      case Mode::wsam:
        return {"wsam", "WSAM"};
      case Mode::fsam:
        return {"fsam", "FSAM"};
      case Mode::looksam:
        return {"looksam", "LookSAM"};
      case Mode::samo:
        return {"samo", "SAMO"};
      case Mode::sgsu:
        return {"sgsu", "SGSU"};
    }
    return {nullptr, nullptr};
  }
  static const char *name_of(Mode mode) { return names(mode).first; }

  static Flatness with_defaults_of(const std::string &name) {
    if (name == "mtcool")
      throw std::invalid_argument(
          "flatness mode 'mtcool' is Python's alone: it perturbs what modules return, by hooks that C++ does not have");
    switch (detail::by_name<Mode>("flatness mode", name, name_of)) {
      case Mode::sam:
        return sam();
      case Mode::asam:
        return asam();
      case Mode::gsam:
        return gsam();
      case Mode::wsam:
        return wsam();
      case Mode::fsam:
        return fsam();
      case Mode::looksam:
        return looksam();
      case Mode::samo:
        return samo();
      case Mode::sgsu:
        return sgsu();
      case Mode::fmtl:
        break;
    }
    return fmtl();
  }

  static void check_number(const char *cls, const char *option, double value,
                           const char *must = "a finite number >= 0") {
    detail::check_option(cls, option, value, value >= 0.0 && std::isfinite(value), must);
  }
  static void check_unit(const char *cls, const char *option, double value) {
    detail::check_option(cls, option, value, value >= 0.0 && value <= 1.0, "in [0, 1]");
  }
  static int64_t checked_every(const char *cls, int64_t every) {
    detail::check_option(cls, "every", std::to_string(every), every >= 1, "an integer >= 1");
    return every;
  }

  Mode mode_;
  Options options_;
  std::optional<int64_t> every_;  // none: the mode has no such option
};

}  // namespace flatmtl
