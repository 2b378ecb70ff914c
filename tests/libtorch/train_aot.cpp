// Trains by a step that was compiled ahead of time: train_aot OPS PACKAGE STATE STEPS OUT
//
//   OPS      flatmtl's shared object (_C.so)
//   PACKAGE  the compiled step (.pt2), of flatmtl.export.training_step
//   STATE    a scripted module with state() -> Tensor[] (parameters, momentum buffers and learning rate, in the order
//   of
//            the step's arguments) and batch(int i) -> Tensor[]
//   OUT      where STATE is saved after training
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <cstdio>
#include <cstdlib>

int main(int argc, char **argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: train_aot OPS PACKAGE STATE STEPS OUT\n");
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  try {
    const c10::InferenceMode guard;
    torch::inductor::AOTIModelPackageLoader step(argv[2]);
    torch::jit::Module state = torch::jit::load(argv[3]);
    for (int64_t i = 0; i < std::atoll(argv[4]); ++i) {
      std::vector<at::Tensor> inputs = state.run_method("state").toTensorVector();
      for (const at::Tensor &tensor : state.run_method("batch", i).toTensorVector()) inputs.push_back(tensor);
      const at::Tensor losses = step.run(inputs)[0];  // parameters and momentum are updated in place
      std::printf("%.9g %.9g\n", losses[0].item<double>(), losses[1].item<double>());
    }
    state.save(argv[5]);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
