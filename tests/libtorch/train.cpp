// Trains a scripted module without Python: train OPS TRAINER BATCHES STEPS OUT
//
//   OPS      flatmtl's shared object (_C.so); torch, linked to this program, is loaded before it
//   TRAINER  the scripted module: train_step(Tensor x, Tensor[] y) -> Tensor
//   BATCHES  a scripted module with x(int i) -> Tensor and y(int i) -> Tensor[]
//   OUT      where the trained module is saved
#include <dlfcn.h>
#include <torch/script.h>

#include <cstdio>
#include <cstdlib>

int main(int argc, char **argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: train OPS TRAINER BATCHES STEPS OUT\n");
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  try {
    torch::jit::Module trainer = torch::jit::load(argv[2]), batches = torch::jit::load(argv[3]);
    for (int64_t i = 0; i < std::atoll(argv[4]); ++i) {
      const auto losses =
          trainer.run_method("train_step", batches.run_method("x", i), batches.run_method("y", i)).toTensor();
      std::printf("%.9g %.9g\n", losses[0].item<double>(), losses[1].item<double>());
    }
    trainer.save(argv[5]);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
