// A user's program: two tasks, a trunk with BatchNorm and two heads, trained with F-MTL. docs/cpp.md shows its parts.
#include <torch/torch.h>

#include <flatmtl/torch.h>

#include <cstdio>
#include <iostream>
#include <sstream>
#include <vector>

struct NetImpl : torch::nn::Module {
  NetImpl() {
    trunk = register_module("trunk", torch::nn::Sequential(torch::nn::Linear(10, 32), torch::nn::BatchNorm1d(32),
                                                           torch::nn::ReLU(), torch::nn::Dropout(0.1)));
    digit = register_module("digit", torch::nn::Linear(32, 4));
    angle = register_module("angle", torch::nn::Linear(32, 1));
  }
  torch::nn::Sequential trunk;
  torch::nn::Linear digit{nullptr}, angle{nullptr};
};
TORCH_MODULE(Net);

struct Batch {
  torch::Tensor x, label, target;
};

// The label is the largest of four numbers, the target a sum of two.
static Batch draw() {
  const torch::Tensor x = torch::randn({64, 10});
  return {x, x.slice(1, 0, 4).argmax(1), x.slice(1, 4, 6).sum(1, /*keepdim=*/true)};
}

// One closure for all tasks: the losses in a vector, without a call of backward().
static std::vector<torch::Tensor> losses(Net &model, const Batch &batch) {
  const torch::Tensor h = model->trunk->forward(batch.x);
  return {torch::cross_entropy_loss(model->digit(h), batch.label), torch::mse_loss(model->angle(h), batch.target)};
}

static double train() {
  Net model;
  // -- training loop
  torch::optim::SGD sgd(model->parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
  flatmtl::FlatMTL optimizer(
      sgd, flatmtl::FlatMTLOptions().aggregator(flatmtl::Aggregator::cagrad(0.4)).rho(0.05).modules({model}));

  double total = 0.0;
  for (int step = 0; step < 200; ++step) {
    const Batch batch = draw();
    const auto values = optimizer.step([&] { return losses(model, batch); });
    total = values[0].item<double>() + values[1].item<double>();
  }
  std::cout << "weights of the losses: " << optimizer.last().weights_loss << "\n";
  // -- end
  {
    const Batch batch = draw();
    // -- between gradient and update
    optimizer.backward([&] { return losses(model, batch); });
    torch::nn::utils::clip_grad_norm_(model->parameters(), 1.0);
    optimizer.step();
    // -- end
  }
  {
    const Batch first = draw(), second = draw();
    // -- one closure a task
    optimizer.step({[&] { return losses(model, first)[0]; }, [&] { return losses(model, second)[1]; }});
    // -- end
    // -- micro-batches
    const std::vector<Batch> micro = {draw(), draw(), draw()};
    optimizer.step([&](const Batch &part) { return losses(model, part); }, micro);
    // -- end
    const Batch batch = draw();
    // -- the task wanted
    optimizer.step([&](std::optional<flatmtl::Task> task) {
      const torch::Tensor h = model->trunk->forward(batch.x);
      std::vector<torch::Tensor> values(2);  // undefined: not computed
      if (!task || *task == flatmtl::Task(0)) values[0] = torch::cross_entropy_loss(model->digit(h), batch.label);
      if (!task || *task == flatmtl::Task(1)) values[1] = torch::mse_loss(model->angle(h), batch.target);
      return values;
    });
    // -- end
  }
  {
    // -- flatness modes
    flatmtl::FlatMTL sam(sgd, flatmtl::FlatMTLOptions().flat("sam").rho(0.05).modules({model}));
    flatmtl::FlatMTL gsam(sgd, flatmtl::FlatMTLOptions().flat(flatmtl::Flatness::gsam(0.2)).modules({model}));
    flatmtl::FlatMTL cheaper(sgd, flatmtl::FlatMTLOptions().every(2).modules({model}));
    // -- end
    const Batch batch = draw();
    for (flatmtl::FlatMTL *mode : {&sam, &gsam, &cheaper}) mode->step([&] { return losses(model, batch); });
  }
  std::stringstream file;
  {
    // -- save
    torch::serialize::OutputArchive archive;
    optimizer.save(archive);
    archive.save_to(file);
    // -- end
  }
  {
    // -- load
    torch::serialize::InputArchive archive;
    archive.load_from(file);
    optimizer.load(archive);
    // -- end
  }
  return total;
}

// A TorchScript module, from torch.jit.save in Python (here: made in place).
static torch::jit::Module scripted() {
  torch::jit::Module module("Net");
  module.register_parameter("trunk", torch::randn({8, 10}).requires_grad_(), false);
  module.register_parameter("digit", torch::randn({4, 8}).requires_grad_(), false);
  module.register_parameter("angle", torch::randn({1, 8}).requires_grad_(), false);
  module.define(R"(
    def forward(self, x):
        h = torch.tanh(torch.matmul(x, self.trunk.t()))
        return torch.matmul(h, self.digit.t()), torch.matmul(h, self.angle.t())
  )");
  return module;
}

static void fine_tune(torch::jit::Module module) {
  // -- TorchScript
  // torch::jit::Module module = torch::jit::load("model.pt");
  module.train();
  torch::optim::Adam adam(flatmtl::parameters(module), torch::optim::AdamOptions(1e-3));
  std::vector<torch::Tensor> trunk;
  for (const auto &parameter : module.named_parameters())
    if (parameter.name.rfind("trunk", 0) == 0) trunk.push_back(parameter.value);
  flatmtl::FlatMTL optimizer(adam, flatmtl::FlatMTLOptions().shared(trunk).modules({module}));
  for (int step = 0; step < 5; ++step) {
    const Batch batch = draw();
    optimizer.step([&] {
      const auto outputs = module.forward({batch.x}).toTuple()->elements();
      return std::vector<torch::Tensor>{torch::cross_entropy_loss(outputs[0].toTensor(), batch.label),
                                        torch::mse_loss(outputs[1].toTensor(), batch.target)};
    });
  }
  // -- end
}

int main() {
  torch::manual_seed(0);
  const Batch batch = draw();
  Net untrained;
  const auto before = losses(untrained, batch);
  const double after = train();
  std::printf("sum of the losses: %.3f before, %.3f after\n", (before[0] + before[1]).item<double>(), after);
  fine_tune(scripted());
  return after < 0.5 * (before[0] + before[1]).item<double>() ? 0 : 1;
}
