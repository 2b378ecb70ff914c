// Trains the network of tests/python/test_cpp.py for some steps, as that test does in Python: --trajectory IN OUT
//   IN   torch.save of a list of runs, a dict each: options, parameters, batches
//   OUT  torch::pickle_save of a list of dicts: losses, records, parameters, gradients and buffers after the last step
#include <torch/torch.h>

#include <flatmtl/torch.h>

#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

namespace {

using Dict = c10::impl::GenericDict;
using torch::Tensor;

// A Python list of tensors, or of numbers.
std::vector<Tensor> tensors(const c10::IValue &list) {
  std::vector<Tensor> result;
  for (const c10::IValue &item : list.toListRef()) result.push_back(item.toTensor());
  return result;
}
std::vector<double> doubles(const c10::IValue &list) {
  std::vector<double> result;
  for (const c10::IValue &item : list.toList()) result.push_back(item.toDouble());
  return result;
}

struct Trajectory {
  Dict in;
  std::vector<Tensor> params;
  torch::nn::BatchNorm1d norm{nullptr};
  Tensor x;
  std::vector<Tensor> targets;  // of one batch; undefined where the task is absent

  template <typename T>
  T get(const std::string &key) const {
    return in.at(key).to<T>();
  }

  // tanh(BatchNorm(x W + b)), dropout, and one linear head a task: cross entropy, squared error, and a head in float64.
  Tensor trunk() {
    Tensor h = torch::linear(x, params[0], params[1]);
    if (norm) h = norm(h);
    return torch::dropout(torch::tanh(h), get<double>("dropout"), true);
  }
  Tensor loss(int64_t task, const Tensor &h) {
    const Tensor &w = params[2 + 2 * task], &b = params[3 + 2 * task];
    if (!targets[task].defined()) return {};
    const Tensor out = torch::linear(h.to(w.scalar_type()), w, b);
    if (task == get<int64_t>("no_loss") && x[0][4].item<double>() > 0.0)
      return get<bool>("slope") ? (out - out.detach()).sum() : (out * 0.0).sum();
    if (task == 0) return torch::nll_loss(torch::log_softmax(out, 1), targets[0]);
    return torch::mse_loss(out, targets[task].to(out.scalar_type()));
  }

  flatmtl::Flatness flatness() const {
    using flatmtl::Flatness;
    const auto name = get<std::string>("flat");
    const auto v = doubles(in.at("flat_values"));
    if (v.empty()) return name;
    const auto every = static_cast<int64_t>(v[0]);
    if (name == "fmtl") return Flatness::fmtl(every, v.size() > 1 ? std::optional<double>(v[1]) : std::nullopt);
    if (name == "gsam") return Flatness::gsam(v[0]);
    if (name == "wsam") return Flatness::wsam(v[0]);
    if (name == "fsam") return Flatness::fsam(v[0], v[1]);
    if (name == "looksam") return Flatness::looksam(every, v[1]);
    if (name == "samo") return Flatness::samo(v[0], v[1]);
    return Flatness::sgsu(v[0]);
  }

  flatmtl::FlatMTLOptions options() const {
    flatmtl::FlatMTLOptions result;
    const auto name = get<std::string>("aggregator");
    const auto values = doubles(in.at("values"));
    result.aggregator(name == "gradvac" ? flatmtl::Aggregator::gradvac(values[0]) : flatmtl::Aggregator(name, values))
        .rho({get<double>("rho_shared"), get<double>("rho_task")})
        .flat(flatness())
        .adaptive(get<bool>("adaptive"))
        .norm(get<std::string>("norm"))
        .family_scale(get<std::string>("family_scale"))
        .replay_rng(get<bool>("replay_rng"))
        .m_sharpness(get<bool>("m_sharpness"))
        .accumulate(get<std::string>("accumulate"))
        .seed(get<int64_t>("seed"));
    if (get<int64_t>("every") > 0) result.every(get<int64_t>("every"));
    if (get<double>("eta") >= 0.0) result.eta(get<double>("eta"));
    if (!get<std::string>("combine").empty()) result.combine(get<std::string>("combine"));
    if (get<double>("max_norm") > 0.0) result.max_norm(get<double>("max_norm"));
    if (!get<std::string>("weighting").empty())
      result.weighting(flatmtl::Weighting(get<std::string>("weighting"), doubles(in.at("weighting_values"))));
    if (!get<std::string>("rows").empty()) result.rows_dtype(torch::kBFloat16);
    if (norm) result.modules({norm});
    if (get<bool>("give_shared")) result.shared(std::vector<Tensor>{params[0], params[1]});
    return result;
  }

  void set(const std::vector<Tensor> &batch) {
    x = batch[0];
    targets.clear();
    for (size_t i = 1; i < batch.size(); ++i) targets.push_back(batch[i].numel() > 0 ? batch[i] : Tensor());
  }

  std::vector<Tensor> all(std::optional<flatmtl::Task> task = std::nullopt) {
    const Tensor h = trunk();
    std::vector<Tensor> losses(3);
    for (int64_t i = 0; i < 3; ++i)
      if (!task || std::get<int64_t>(*task) == i) losses[i] = loss(i, h);
    return losses;
  }

  Tensor stacked() {
    const auto losses = all();
    return torch::stack({losses[0].to(torch::kDouble), losses[1].to(torch::kDouble), losses[2]});
  }

  void step(flatmtl::FlatMTL &optimizer, const std::string &form) {
    if (form == "closures") {
      flatmtl::TaskClosures closures;
      for (int64_t i = 0; i < 3; ++i) closures.push_back([this, i] { return loss(i, trunk()); });
      optimizer.step(closures);
    } else if (form == "task") {
      optimizer.step([this](std::optional<flatmtl::Task> task) { return all(task); });
    } else if (form == "stack") {
      optimizer.step([this] { return stacked(); });
    } else {
      optimizer.step([this] { return all(); });
    }
  }

  void step(flatmtl::FlatMTL &optimizer, const std::string &form, const std::vector<std::vector<Tensor>> &micro) {
    using Batch = std::vector<Tensor>;
    if (form == "closures") {
      flatmtl::BatchTaskClosures<Batch> closures;
      for (int64_t i = 0; i < 3; ++i)
        closures.push_back([this, i](const Batch &batch) {
          set(batch);
          return loss(i, trunk());
        });
      optimizer.step(closures, micro);
    } else if (form == "task") {
      optimizer.step(
          [this](const Batch &batch, std::optional<flatmtl::Task> task) {
            set(batch);
            return all(task);
          },
          micro);
    } else if (form == "stack") {
      optimizer.step(
          [this](const Batch &batch) {
            set(batch);
            return stacked();
          },
          micro);
    } else {
      optimizer.step(
          [this](const Batch &batch) {
            set(batch);
            return all();
          },
          micro);
    }
  }

  Dict run() {
    for (const Tensor &p : tensors(in.at("params"))) params.push_back(p.clone().requires_grad_());
    if (get<bool>("batch_norm")) {
      norm = torch::nn::BatchNorm1d(params[1].size(0));
      for (std::vector<Tensor> list : {norm->parameters(), norm->buffers()})
        for (Tensor &tensor : list)
          if (tensor.is_floating_point()) tensor.set_data(tensor.detach().to(params[1].scalar_type()));
      for (const Tensor &p : norm->parameters()) params.push_back(p);
    }
    torch::optim::SGD sgd(
        params, torch::optim::SGDOptions(get<double>("lr")).momentum(get<double>("momentum")).weight_decay(1e-3));
    flatmtl::FlatMTL optimizer(sgd, options());
    torch::manual_seed(11);

    Dict out(c10::StringType::get(), c10::AnyType::get());
    std::vector<Tensor> losses, weights_loss, weights_flat, sharpness, cosine, loss_weights;
    const std::string form = get<std::string>("form");
    const c10::IValue batches = in.at("batches");
    for (const c10::IValue &item : batches.toListRef()) {
      if (get<int64_t>("micro") == 0) {
        set(tensors(item));
        step(optimizer, form);
      } else {
        std::vector<std::vector<Tensor>> micro;
        for (const c10::IValue &part : item.toListRef()) micro.push_back(tensors(part));
        step(optimizer, form, micro);
      }
      losses.push_back(optimizer.last().losses);
      weights_loss.push_back(optimizer.last().weights_loss);
      weights_flat.push_back(optimizer.last().weights_flat);
      sharpness.push_back(optimizer.last().sharpness);
      cosine.push_back(optimizer.last().cosine_flat);
      loss_weights.push_back(optimizer.last().loss_weights);
    }
    std::vector<Tensor> grads, values, buffers;
    for (const Tensor &p : params) {
      values.push_back(p.detach());
      grads.push_back(p.grad().defined() ? p.grad() : torch::empty({0}));
    }
    if (norm) buffers = norm->buffers();
    buffers.push_back(torch::rand({3}));  // where the random numbers stand
    const auto put = [&](const char *key, const std::vector<Tensor> &list) { out.insert(key, list); };
    put("params", values);
    put("grads", grads);
    put("buffers", buffers);
    put("losses", losses);
    put("weights_loss", weights_loss);
    put("weights_flat", weights_flat);
    put("sharpness", sharpness);
    put("cosine_flat", cosine);
    put("loss_weights", loss_weights);
    return out;
  }
};

}  // namespace

int trajectory_main(const char *in, const char *out);

int trajectory_main(const char *in, const char *out) {
  std::ifstream file(in, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  c10::impl::GenericList results(c10::AnyType::get());
  const c10::IValue runs = torch::pickle_load(bytes);
  for (const c10::IValue &run : runs.toListRef()) {
    Trajectory trajectory{run.toGenericDict(), {}, nullptr, {}, {}};
    results.push_back(trajectory.run());
  }
  const std::vector<char> written = torch::pickle_save(results);
  std::ofstream(out, std::ios::binary).write(written.data(), static_cast<std::streamsize>(written.size()));
  return 0;
}
