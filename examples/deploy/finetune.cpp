// Fine-tunes a TorchScript model with F-MTL, without Python: finetune FOLDER [THREADS]
// Reads model.pt and data.pt of train.py, writes tuned.pt.
#include <torch/script.h>
#include <torch/torch.h>

#include <flatmtl/torch.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using torch::Tensor;

// A file of torch.save: a dict of tensors.
std::map<std::string, Tensor> read(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (bytes.empty()) throw std::runtime_error("cannot read " + path);
  std::map<std::string, Tensor> result;
  for (const auto &entry : torch::pickle_load(bytes).toGenericDict())
    result[entry.key().toStringRef()] = entry.value().toTensor();
  return result;
}

// The two heads' outputs.
std::vector<Tensor> outputs(torch::jit::Module &model, const Tensor &x) {
  std::vector<Tensor> result;
  const c10::IValue value = model.forward({x});
  for (const c10::IValue &output : value.toTupleRef().elements()) result.push_back(output.toTensor());
  return result;
}

void print_accuracy(const char *when, torch::jit::Module &model, const Tensor &x, const Tensor &y) {
  const torch::NoGradGuard no_grad;
  model.eval();
  const std::vector<Tensor> out = outputs(model, x);
  double percent[2];
  for (int task = 0; task < 2; ++task)
    percent[task] = 100 * (out[task].argmax(1) == y.select(1, task)).to(torch::kFloat).mean().item<double>();
  std::printf("%s: %.1f %% left, %.1f %% right on pictures of the new scanner\n", when, percent[0], percent[1]);
}

void run(const std::string &folder) {
  torch::jit::Module model = torch::jit::load(folder + "/model.pt");
  const auto data = read(folder + "/data.pt");
  print_accuracy("before", model, data.at("test_x"), data.at("test_y"));

  // The shared parameters have to be named: a TorchScript model gives zeros as gradient where a loss does not reach.
  std::vector<Tensor> shared;
  for (const auto &parameter : model.named_parameters())
    if (parameter.name.rfind("trunk.", 0) == 0) shared.push_back(parameter.value);
  torch::optim::SGD sgd(flatmtl::parameters(model), torch::optim::SGDOptions(0.01).momentum(0.9));
  flatmtl::FlatMTL optimizer(sgd,
                             flatmtl::FlatMTLOptions().aggregator("cagrad").rho(0.05).shared(shared).modules({model}));

  model.train();
  const Tensor batches = data.at("batches");
  for (int64_t step = 0; step < batches.size(0); ++step) {
    const Tensor x = data.at("tune_x").index({batches[step]}), y = data.at("tune_y").index({batches[step]});
    const std::vector<Tensor> losses = optimizer.step([&] {
      const std::vector<Tensor> out = outputs(model, x);
      return std::vector<Tensor>{torch::cross_entropy_loss(out[0], y.select(1, 0)),
                                 torch::cross_entropy_loss(out[1], y.select(1, 1))};
    });
    if (step % 20 == 0)
      std::printf("step %3d: losses %.9g %.9g\n", static_cast<int>(step), losses[0].item<double>(),
                  losses[1].item<double>());
  }
  print_accuracy("after", model, data.at("test_x"), data.at("test_y"));
  model.save(folder + "/tuned.pt");
}

}  // namespace

int main(int argc, char **argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: finetune FOLDER [THREADS]\n");
    return 2;
  }
  try {
    at::set_num_threads(argc > 2 ? std::atoi(argv[2]) : 1);
    run(argv[1]);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
