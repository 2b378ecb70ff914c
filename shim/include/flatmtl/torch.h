// flatmtl/torch.h - F-MTL as a torch::optim::Optimizer that wraps the one you have. Header-only: compiled in your
// application against your LibTorch (2.10 or newer), linked to libflatmtl. CMake: flatmtl::torch.
//
//   torch::optim::SGD sgd(model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
//   flatmtl::FlatMTL optimizer(sgd, flatmtl::FlatMTLOptions().aggregator("cagrad").rho(0.05).modules({model}));
//   auto losses = optimizer.step([&] { return std::vector<torch::Tensor>{loss_a(model), loss_b(model)}; });
//
// Results equal those of the Python package bit for bit, given gradients that are equal.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/optim/lbfgs.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize.h>
#include <torch/types.h>

#include "torch/closures.h"
#include "torch/errors.h"
#include "torch/options.h"
#include "torch/record.h"
#include "torch/state.h"
#include "torch/step.h"

namespace flatmtl {

// F-MTL (arXiv 2211.13723, Algorithm 1); see the Python class of the same name for what a step does. Parameters are CPU
// tensors of float32, float64, bfloat16 or float16.
//
// A closure evaluates the model and returns the task losses, without calling backward: a std::vector<torch::Tensor>, a
// std::array, a torch::OrderedDict or std::map from names to tensors, or one tensor, 1-D or 0-D (one task). An
// undefined tensor (std::nullopt in a vector of optionals) is a task that is absent from this batch. The closure is
// called K + 1 times, or as often as the flatness mode needs. If it has a parameter, of type
// std::optional<flatmtl::Task>, that is std::nullopt in the unperturbed pass and the one task wanted in a perturbed
// pass; the losses of other tasks are then not looked at. Or TaskClosures or NamedTaskClosures: one closure a task,
// each returning its own loss.
//
// If a step fails before the wrapped optimizer's own update begins (the closure throws, a gradient is not finite),
// parameters, .grad, optimizer state, buffers of options.modules() and the CPU's random generator are as they were.
//
// Not thread safe, as every optimizer.
class FlatMTL : public torch::optim::Optimizer {
  // Anything callable; a LossClosure, which may be empty, goes to the override.
  template <typename F>
  using enable_if_closure = std::enable_if_t<detail::is_closure<F> && !std::is_same_v<std::decay_t<F>, LossClosure>>;
  using NamedLosses = torch::OrderedDict<std::string, torch::Tensor>;

 public:
  // The optimizer is kept by reference and must outlive this one.
  explicit FlatMTL(torch::optim::Optimizer &optimizer, FlatMTLOptions options = {})
      : FlatMTL(std::shared_ptr<torch::optim::Optimizer>(std::shared_ptr<void>(), &optimizer), std::move(options)) {}

  // Owns the optimizer, or a share of it. std::invalid_argument for an option out of range, for LBFGS and FlatMTL.
  explicit FlatMTL(std::shared_ptr<torch::optim::Optimizer> optimizer, FlatMTLOptions options = {})
      : Optimizer(std::vector<torch::optim::OptimizerParamGroup>(), checked(optimizer.get()).defaults().clone()),
        optimizer_(std::move(optimizer)),
        options_(options.settled()) {
    if (options_.shared()) {
      roles_.fixed.emplace();
      for (const auto &tensor : *options_.shared()) roles_.fixed->insert(detail::Roles::key(tensor));
    }
    follow_groups();
  }

  // -- the step -----------------------------------------------------------------------------------------------------

  // One F-MTL step. Returns the losses at the unperturbed point, detached, in the container that came.
  template <typename F, typename = enable_if_closure<F>>
  auto step(F &&closure) {
    return run(closure, true);
  }
  std::vector<torch::Tensor> step(const TaskClosures &closures) {
    return run_each(closures, detail::WithoutBatches(), true);
  }
  NamedLosses step(const NamedTaskClosures &closures) { return run_each(closures, detail::WithoutBatches(), true); }

  // The same with micro-batches, for a batch that does not fit at once. The closure is called with each in turn, as
  // closure(batch) or closure(batch, task), and both families of gradients are means over them, as are the losses: the
  // step of the one large batch, where the losses are means over their examples, the micro-batches of one size, and the
  // model has no BatchNorm. A task that is absent from some takes the mean over the others. std::invalid_argument if
  // there are none.
  template <typename F, typename Batch, typename = std::enable_if_t<detail::is_closure<F, const Batch &>>>
  auto step(F &&closure, const std::vector<Batch> &batches) {
    return run(closure, batches, true);
  }
  template <typename Batch>
  std::vector<torch::Tensor> step(const BatchTaskClosures<Batch> &closures, const std::vector<Batch> &batches) {
    return run_each(closures, detail::WithBatches<Batch>(batches, false), true);
  }
  template <typename Batch>
  NamedLosses step(const NamedBatchTaskClosures<Batch> &closures, const std::vector<Batch> &batches) {
    return run_each(closures, detail::WithBatches<Batch>(batches, false), true);
  }

  // Without a closure: applies .grad by the wrapped optimizer. With one, which returns one tensor: as above.
  torch::Tensor step(LossClosure closure = nullptr) override {
    if (closure) return run(closure, true);
    torch::NoGradGuard no_grad;
    return apply();
  }

  // All of a step but the wrapped optimizer's update: parameters restored, the combined update in .grad, which is
  // overwritten. Clip or log, then step(). With a weighting that observes (FAMO) a copy of the closure and of the
  // batches is kept until then, and called once more; what the closure refers to must live as long.
  template <typename F, typename = std::enable_if_t<detail::is_closure<F>>>
  auto backward(F &&closure) {
    return run(closure, false);
  }
  std::vector<torch::Tensor> backward(const TaskClosures &closures) {
    return run_each(closures, detail::WithoutBatches(), false);
  }
  NamedLosses backward(const NamedTaskClosures &closures) {
    return run_each(closures, detail::WithoutBatches(), false);
  }
  template <typename F, typename Batch, typename = std::enable_if_t<detail::is_closure<F, const Batch &>>>
  auto backward(F &&closure, const std::vector<Batch> &batches) {
    return run(closure, batches, false);
  }
  template <typename Batch>
  std::vector<torch::Tensor> backward(const BatchTaskClosures<Batch> &closures, const std::vector<Batch> &batches) {
    return run_each(closures, detail::WithBatches<Batch>(batches, observes()), false);
  }
  template <typename Batch>
  NamedLosses backward(const NamedBatchTaskClosures<Batch> &closures, const std::vector<Batch> &batches) {
    return run_each(closures, detail::WithBatches<Batch>(batches, observes()), false);
  }

  // The record of the last step; its tensors are undefined before the first.
  const Record &last() const { return last_; }
  // How many steps were made.
  int64_t steps() const { return steps_; }
  // The options, with those that were left to the flatness mode as they came out.
  const FlatMTLOptions &flat_options() const { return options_; }
  torch::optim::Optimizer &wrapped() { return *optimizer_; }

  // -- the wrapped optimizer's --------------------------------------------------------------------------------------
  // The groups that this object has as a torch::optim::Optimizer& (for schedulers) follow the wrapped optimizer's:
  // same parameters, and get_lr and set_lr of their options are passed on.

  std::vector<torch::optim::OptimizerParamGroup> &param_groups() noexcept { return optimizer_->param_groups(); }
  const std::vector<torch::optim::OptimizerParamGroup> &param_groups() const noexcept {
    return std::as_const(*optimizer_).param_groups();
  }
  torch::optim::OptimizerOptions &defaults() noexcept { return optimizer_->defaults(); }
  auto &state() noexcept { return optimizer_->state(); }
  void zero_grad(bool set_to_none = true) { optimizer_->zero_grad(set_to_none); }

  // As the wrapped optimizer's; rho is that of the group, if not the one in the options.
  void add_param_group(const torch::optim::OptimizerParamGroup &group, std::optional<Rho> rho = std::nullopt) {
    if (rho) detail::check_rho(*rho, "rho of the param group");
    follow_groups();
    optimizer_->add_param_group(group);
    follow_groups();
    if (rho) rhos_.back() = *rho;
  }

  // Radius of the perturbation of the parameters of one group. std::out_of_range if there is no such group.
  void set_rho(size_t group, Rho rho) {
    follow_groups();
    detail::check_rho(rho, "param_groups[" + std::to_string(group) + "]['rho']");
    rhos_.at(group) = rho;
  }
  Rho rho(size_t group) {
    follow_groups();
    return rhos_.at(group);
  }

  // -- checkpoints --------------------------------------------------------------------------------------------------

  // The wrapped optimizer's archive with this one's state beside it, in the entry "flatmtl": number of steps, seed,
  // tasks, roles, radii, the parameters' shapes, and what aggregator, weighting and flatness mode keep.
  void save(torch::serialize::OutputArchive &archive) const override {
    optimizer_->save(archive);
    std::vector<torch::Tensor> params = all_tensors();
    const auto &weighting = options_.weighting();
    detail::State state{steps_,
                        options_.seed(),
                        tasks_,
                        {},
                        {},
                        {},
                        options_.aggregator().name(),
                        weighting ? weighting->name() : "",
                        options_.flat().name(),
                        methods_};
    for (const auto &p : params) {
      const auto role = roles_.of.find(detail::Roles::key(p));
      state.roles.push_back(role == roles_.of.end() ? std::nullopt : std::optional<int64_t>(role->second));
      state.shapes.push_back(p.sizes().vec());
    }
    for (const Rho &rho : rhos_) state.rhos.emplace_back(rho.shared, rho.task);
    torch::serialize::OutputArchive own(archive.compilation_unit());
    state.save(own);
    archive.write("flatmtl", own);
  }

  // Loads what save wrote, or an archive of the wrapped optimizer alone (roles are then found anew). Another version,
  // or another number of tasks, groups or parameters, another shape, aggregator, weighting or flatness mode:
  // std::runtime_error; nothing has then changed.
  void load(torch::serialize::InputArchive &archive) override {
    follow_groups();
    std::optional<detail::State> state;
    torch::serialize::InputArchive own;
    if (archive.try_read("flatmtl", own)) {
      state = detail::State::load(own);
      state->check(all_tensors(), rhos_.size(), tasks_, options_);
    }
    detail::load_all_or_nothing(*optimizer_, archive);
    steps_ = 0;
    tasks_.reset();
    last_ = Record();
    roles_.of.clear();
    methods_ = detail::MethodStates();
    after_update_.reset();
    if (!state) return;
    steps_ = state->steps;
    options_.seed(state->seed);
    tasks_ = state->tasks;
    methods_ = state->methods;
    const auto params = all_tensors();
    for (size_t i = 0; i < params.size(); ++i)
      if (state->roles[i]) roles_.load(params[i], *state->roles[i]);
    for (size_t g = 0; g < rhos_.size(); ++g) rhos_[g] = Rho(state->rhos[g].first, state->rhos[g].second);
  }

 private:
  // Options of a group as a torch::optim::Optimizer& sees them: the learning rate of the wrapped optimizer's group.
  class GroupOptions : public torch::optim::OptimizerOptions {
   public:
    GroupOptions(torch::optim::Optimizer *optimizer, size_t group) : optimizer_(optimizer), group_(group) {}
    std::unique_ptr<OptimizerOptions> clone() const override { return std::make_unique<GroupOptions>(*this); }
    double get_lr() const override { return options().get_lr(); }
    void set_lr(const double lr) override { options().set_lr(lr); }

   private:
    OptimizerOptions &options() const { return optimizer_->param_groups().at(group_).options(); }
    torch::optim::Optimizer *optimizer_;
    size_t group_;
  };

  static torch::optim::Optimizer &checked(torch::optim::Optimizer *optimizer) {
    if (!optimizer) throw std::invalid_argument("optimizer must be a torch.optim.Optimizer, but is a null pointer");
    if (dynamic_cast<FlatMTL *>(optimizer)) throw std::invalid_argument("optimizer is a FlatMTL already");
    if (dynamic_cast<torch::optim::LBFGS *>(optimizer))
      throw std::invalid_argument(
          "LBFGS cannot be wrapped: its step evaluates a closure of a single loss several times");
    return *optimizer;
  }

  // Groups that were added to the wrapped optimizer are added here, and the other way round.
  void follow_groups() {
    auto &groups = optimizer_->param_groups();
    for (size_t g = groups.size(); g < param_groups_.size(); ++g) {
      optimizer_->add_param_group(param_groups_[g]);
      param_groups_[g].set_options(std::make_unique<GroupOptions>(optimizer_.get(), g));
    }
    while (param_groups_.size() < groups.size()) {
      const size_t g = param_groups_.size();
      param_groups_.emplace_back(groups[g].params(), std::make_unique<GroupOptions>(optimizer_.get(), g));
    }
    rhos_.resize(groups.size(), options_.rho());
    for (size_t g = 0; g < groups.size(); ++g) param_groups_[g].params() = groups[g].params();
  }

  template <typename F, typename R = detail::Returned<F>>
  typename R::type run(F &function, bool apply_too) {
    const bool copy = !apply_too && observes();
    return LossTraits<typename R::type>::write(
        run_erased(detail::erase<R>(function, detail::WithoutBatches(), copy), apply_too));
  }
  template <typename F, typename Batch, typename R = detail::Returned<F, const Batch &>>
  typename R::type run(F &function, const std::vector<Batch> &batches, bool apply_too) {
    const bool copy = !apply_too && observes();
    return LossTraits<typename R::type>::write(
        run_erased(detail::erase<R>(function, detail::WithBatches<Batch>(batches, copy), copy), apply_too));
  }

  bool observes() const { return options_.weighting() && options_.weighting()->observes(); }

  template <typename F, typename Caller>
  std::vector<torch::Tensor> run_each(const std::vector<std::function<F>> &closures, Caller caller, bool apply_too) {
    return run_erased(detail::erase_each(closures, caller), apply_too).values;
  }
  template <typename F, typename Caller>
  NamedLosses run_each(const std::vector<std::pair<std::string, F>> &closures, Caller caller, bool apply_too) {
    return LossTraits<NamedLosses>::write(run_erased(detail::erase_each(closures, caller), apply_too));
  }

  TaskLosses run_erased(const detail::Closure &closure, bool apply_too) {
    torch::NoGradGuard no_grad;
    follow_groups();
    after_update_.reset();
    auto step = std::make_shared<detail::Step>(parameters_now(), &reserve_, options_, roles_, tasks_, methods_, steps_);
    bool skipped = false;
    try {
      step->run(closure);
    } catch (const NonFiniteError &) {
      step->rollback();
      if (options_.nonfinite() == "raise") throw;
      skipped = true;
    } catch (...) {
      step->rollback();
      throw;
    }
    for (size_t i = 0; i < step->params().size(); ++i) {
      torch::Tensor tensor = step->params()[i].tensor;
      tensor.mutable_grad() = skipped ? torch::Tensor() : step->gradient(i);
    }
    if (skipped) {
      last_ = step->skipped_record();
      return step->losses();
    }
    roles_.of = step->new_roles();
    tasks_ = step->task_names();
    methods_ = step->methods();
    last_ = step->record();
    ++steps_;
    if (step->keep_for_observation()) after_update_ = step;
    if (apply_too) apply();
    return step->losses();
  }

  torch::Tensor apply() {
    const auto observed = std::move(after_update_);
    torch::Tensor result = optimizer_->step();
    if (observed) methods_.weighting = observed->observe(methods_.weighting);
    return result;
  }

  std::vector<detail::Parameter> parameters_now() const {
    std::vector<detail::Parameter> found;
    size_t index = 0;
    const auto &groups = param_groups();
    for (size_t g = 0; g < groups.size(); ++g)
      for (size_t i = 0; i < groups[g].params().size(); ++i, ++index) {
        const torch::Tensor &p = groups[g].params()[i];
        if (p.defined() && p.requires_grad())
          found.push_back({p, rhos_[g].shared, rhos_[g].task,
                           "param_groups[" + std::to_string(g) + "]['params'][" + std::to_string(i) + "]", index});
      }
    if (found.empty()) throw std::runtime_error("no parameter of the optimizer requires grad");
    return found;
  }

  std::vector<torch::Tensor> all_tensors() const {
    std::vector<torch::Tensor> tensors;
    for (const auto &group : param_groups())
      tensors.insert(tensors.end(), group.params().begin(), group.params().end());
    return tensors;
  }

  std::shared_ptr<torch::optim::Optimizer> optimizer_;
  FlatMTLOptions options_;
  std::vector<Rho> rhos_;  // one a group
  detail::Roles roles_;
  std::optional<std::vector<Task>> tasks_;
  detail::MethodStates methods_;                // what they keep
  std::shared_ptr<detail::Step> after_update_;  // what a weighting is to learn from after the next update
  detail::Reserve reserve_;
  int64_t steps_ = 0;
  Record last_;
};

}  // namespace flatmtl
