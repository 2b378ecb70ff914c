/* digits.c - trains a two-task network on handwritten digits with flatmtl.h alone.
 *
 *   pixels (64) -> hidden layer (64, ReLU; shared) -> task 0: which digit (10 classes)
 *                                                  -> task 1: odd or even  (2 classes)
 *
 * Usage: digits digits.csv [rho]      rho 0 is plain gradient aggregation; the default is 0.1
 */
#include <flatmtl.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  PIXELS = 64,
  HIDDEN = 64,
  TASKS = 2,
  MAX_CLASSES = 10,
  MAX_DIGITS = 2000,
  TRAIN = 1200,
  BATCH = 30,
  EPOCHS = 15
};

static const float learning_rate = 0.1f;
static const int num_classes[TASKS] = {10, 2};

typedef struct data {
  int count;
  float pixels[MAX_DIGITS][PIXELS]; /* 0 to 1 */
  int labels[MAX_DIGITS][TASKS];
} data;

/* One linear layer, or its gradient: weight[outputs][inputs], row-major, and bias[outputs]. */
typedef struct layer {
  float weight[HIDDEN * PIXELS]; /* room for the largest */
  float bias[HIDDEN];
} layer;

typedef struct network {
  layer shared;
  layer heads[TASKS];
} network;

/* Where a network's layers stand is what flatmtl gets: two segments a layer, weight and bias. */
static network params, saved;
static network loss_gradients[TASKS], perturbed_gradients[TASKS];
static layer update;
static data digits;

static void fail(const char *what) {
  fprintf(stderr, "digits: %s\n", what);
  exit(EXIT_FAILURE);
}

/* Every call of flatmtl comes through here: errors end the program with a sentence, remarks are passed on. */
static flatmtl_status check(flatmtl_status status, const flatmtl_error *error) {
  if (status < 0) {
    char message[256];
    if (flatmtl_error_message(error, message, sizeof message) != FLATMTL_OK) fail("unknown error");
    fail(message);
  }
  return status;
}

/* Memory aligned as flatmtl wants it. */
static void *aligned(size_t bytes) {
  void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!memory) fail("out of memory");
  return memory;
}

/* Numbers for initial weights and the order of the digits: splitmix64. */
static double uniform(void) {
  static uint64_t state = 1;
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

static void shuffle(int *order, int count) {
  for (int i = count - 1; i > 0; i--) {
    int j = (int)(uniform() * (i + 1)), kept = order[i];
    order[i] = order[j];
    order[j] = kept;
  }
}

/* 64 pixels from 0 to 16 and the label a line, as export_digits.py writes them. */
static void read_digits(const char *path) {
  FILE *file = fopen(path, "r");
  if (!file) fail("the file of digits cannot be opened");
  int value, label;
  for (digits.count = 0; digits.count < MAX_DIGITS && fscanf(file, "%d,", &value) == 1; digits.count++) {
    float *pixels = digits.pixels[digits.count];
    pixels[0] = (float)value / 16;
    for (int p = 1; p < PIXELS; p++) {
      if (fscanf(file, "%d,", &value) != 1) fail("a line of the file of digits is cut short");
      pixels[p] = (float)value / 16;
    }
    if (fscanf(file, "%d", &label) != 1 || label < 0 || label > 9) fail("a label in the file is no digit");
    digits.labels[digits.count][0] = label;
    digits.labels[digits.count][1] = label % 2;
  }
  fclose(file);
  if (digits.count <= TRAIN) fail("the file holds too few digits");
}

static void init_layer(layer *l, int inputs, int outputs) {
  for (int i = 0; i < inputs * outputs; i++) l->weight[i] = (float)((2 * uniform() - 1) * sqrt(3.0 / inputs));
}

static void forward_layer(const layer *l, int inputs, int outputs, const float *x, float *y) {
  for (int o = 0; o < outputs; o++) {
    y[o] = l->bias[o];
    for (int i = 0; i < inputs; i++) y[o] += l->weight[o * inputs + i] * x[i];
  }
}

/* gradient += d loss / d layer, given dy = d loss / d output. */
static void backward_layer(layer *gradient, int inputs, int outputs, const float *x, const float *dy) {
  for (int o = 0; o < outputs; o++) {
    gradient->bias[o] += dy[o];
    for (int i = 0; i < inputs; i++) gradient->weight[o * inputs + i] += dy[o] * x[i];
  }
}

static void forward(const float *pixels, int task, float *hidden, float *logits) {
  forward_layer(&params.shared, PIXELS, HIDDEN, pixels, hidden);
  for (int h = 0; h < HIDDEN; h++) hidden[h] = fmaxf(hidden[h], 0);
  forward_layer(&params.heads[task], HIDDEN, num_classes[task], hidden, logits);
}

/* The gradient of one task's mean cross-entropy over a batch, in gradient->shared and gradient->heads[task]; returns
 * the loss. */
static double backward(const int *batch, int task, network *gradient) {
  const int classes = num_classes[task];
  double loss = 0;
  memset(gradient, 0, sizeof *gradient);
  for (int n = 0; n < BATCH; n++) {
    const float *pixels = digits.pixels[batch[n]];
    const int label = digits.labels[batch[n]][task];
    float hidden[HIDDEN], d_hidden[HIDDEN] = {0}, logits[MAX_CLASSES], top = -INFINITY, sum = 0;
    forward(pixels, task, hidden, logits);
    for (int c = 0; c < classes; c++) top = fmaxf(top, logits[c]);
    for (int c = 0; c < classes; c++) sum += expf(logits[c] - top);
    loss += (logf(sum) + top - logits[label]) / BATCH;
    for (int c = 0; c < classes; c++) {
      logits[c] = (expf(logits[c] - top) / sum - (c == label ? 1.0f : 0.0f)) / BATCH; /* now d loss / d logit */
      for (int h = 0; h < HIDDEN; h++) {
        if (hidden[h] > 0) d_hidden[h] += params.heads[task].weight[c * HIDDEN + h] * logits[c];
      }
    }
    backward_layer(&gradient->heads[task], HIDDEN, classes, hidden, logits);
    backward_layer(&gradient->shared, PIXELS, HIDDEN, pixels, d_hidden);
  }
  return loss;
}

static void descend(layer *l, const layer *gradient, int inputs, int outputs) {
  for (int i = 0; i < inputs * outputs; i++) l->weight[i] -= learning_rate * gradient->weight[i];
  for (int o = 0; o < outputs; o++) l->bias[o] -= learning_rate * gradient->bias[o];
}

static double accuracy(const int *order, int count, int task) {
  int right = 0;
  for (int n = 0; n < count; n++) {
    float hidden[HIDDEN], logits[MAX_CLASSES];
    int best = 0;
    forward(digits.pixels[order[n]], task, hidden, logits);
    for (int c = 1; c < num_classes[task]; c++) best = logits[c] > logits[best] ? c : best;
    right += best == digits.labels[order[n]][task];
  }
  return 100.0 * right / count;
}

static void report(int epoch, const int *order, double sharpness, int conflicts, int steps) {
  printf("%5d", epoch);
  for (int task = 0; task < TASKS; task++) {
    printf("  %6.2f %6.2f", accuracy(order, TRAIN, task), accuracy(order + TRAIN, digits.count - TRAIN, task));
  }
  if (steps > 0) printf("  %9.5f  %8.1f %%", sharpness / steps, 100.0 * conflicts / steps);
  printf("\n");
}

int main(int argc, char **argv) {
  if (argc < 2 || argc > 3) fail("usage: digits digits.csv [rho]");
  flatmtl_error error;
  flatmtl_settings settings;
  check(flatmtl_settings_default(&settings, &error), &error);
  check(flatmtl_method_by_name("cagrad", &settings.method, &error), &error);
  settings.rho_shared = settings.rho_task = argc == 3 ? strtod(argv[2], NULL) : 0.1;
  const int flat = settings.rho_shared > 0;

  /* The problem: which memory holds parameters, their copies and the gradients. */
  const int64_t shared_lengths[2] = {HIDDEN * PIXELS, HIDDEN};
  int64_t own_lengths[TASKS][2];
  void *theta[2] = {params.shared.weight, params.shared.bias};
  void *theta_saved[2] = {saved.shared.weight, saved.shared.bias};
  void *theta_update[2] = {update.weight, update.bias};
  const void *g[TASKS * 2], *s[TASKS * 2], *h[TASKS][2], *t[TASKS][2];
  void *psi[TASKS][2], *psi_saved[TASKS][2];
  flatmtl_vector own[TASKS], own_saved[TASKS];
  flatmtl_rows own_loss[TASKS], own_perturbed[TASKS];
  for (int i = 0; i < TASKS; i++) {
    const network *loss = &loss_gradients[i], *perturbed = &perturbed_gradients[i];
    g[2 * i] = loss->shared.weight, g[2 * i + 1] = loss->shared.bias;
    s[2 * i] = perturbed->shared.weight, s[2 * i + 1] = perturbed->shared.bias;
    h[i][0] = loss->heads[i].weight, h[i][1] = loss->heads[i].bias;
    t[i][0] = perturbed->heads[i].weight, t[i][1] = perturbed->heads[i].bias;
    psi[i][0] = params.heads[i].weight, psi[i][1] = params.heads[i].bias;
    psi_saved[i][0] = saved.heads[i].weight, psi_saved[i][1] = saved.heads[i].bias;
    own_lengths[i][0] = num_classes[i] * HIDDEN, own_lengths[i][1] = num_classes[i];
    own[i] = (flatmtl_vector){FLATMTL_F32, 2, own_lengths[i], psi[i]};
    own_saved[i] = (flatmtl_vector){FLATMTL_F32, 2, own_lengths[i], psi_saved[i]};
    own_loss[i] = (flatmtl_rows){FLATMTL_F32, 1, 2, own_lengths[i], h[i]};
    own_perturbed[i] = (flatmtl_rows){FLATMTL_F32, 1, 2, own_lengths[i], t[i]};
  }
  const flatmtl_vector shared_update = {FLATMTL_F32, 2, shared_lengths, theta_update};
  const flatmtl_problem problem = {.num_tasks = TASKS,
                                   .shared = {FLATMTL_F32, 2, shared_lengths, theta},
                                   .shared_saved = {FLATMTL_F32, 2, shared_lengths, theta_saved},
                                   .shared_loss = {FLATMTL_F32, TASKS, 2, shared_lengths, g},
                                   .shared_perturbed = {FLATMTL_F32, TASKS, 2, shared_lengths, s},
                                   .own = own,
                                   .own_saved = own_saved,
                                   .own_loss = own_loss,
                                   .own_perturbed = own_perturbed};

  /* The library allocates nothing: a step and its scratch memory are ours. */
  size_t step_bytes;
  flatmtl_context context = {NULL, NULL, NULL, 0};
  check(flatmtl_step_size(TASKS, &step_bytes, &error), &error);
  check(flatmtl_workspace_size(TASKS, &context.workspace_size, &error), &error);
  void *memory = aligned(step_bytes);
  context.workspace = aligned(context.workspace_size);
  flatmtl_step *step;
  check(flatmtl_step_init(memory, step_bytes, &problem, &settings, &step, &error), &error);

  read_digits(argv[1]);
  int order[MAX_DIGITS];
  for (int n = 0; n < digits.count; n++) order[n] = n;
  shuffle(order, digits.count); /* the first TRAIN are for training, the others never */
  init_layer(&params.shared, PIXELS, HIDDEN);
  for (int i = 0; i < TASKS; i++) init_layer(&params.heads[i], HIDDEN, num_classes[i]);

  printf("flatmtl %s (%s), %s, rho %g: %d digits for training, %d for testing\n", flatmtl_version(), flatmtl_isa(),
         flatmtl_method_name(settings.method), settings.rho_shared, TRAIN, digits.count - TRAIN);
  printf("       digit: train, test   parity: train, test  sharpness  conflicts\n");
  report(0, order, 0, 0, 0);
  for (int epoch = 1; epoch <= EPOCHS; epoch++) {
    double sharpness = flat ? 0 : NAN; /* without perturbed passes it is not measured */
    int conflicts = 0, stationary = 0;
    shuffle(order, TRAIN);
    for (const int *batch = order; batch < order + TRAIN; batch += BATCH) {
      double loss[TASKS];
      for (int i = 0; i < TASKS; i++) loss[i] = backward(batch, i, &loss_gradients[i]);
      check(flatmtl_step_begin(step, &context, &error), &error);
      for (int i = 0; flat && i < TASKS; i++) {
        check(flatmtl_step_perturb(step, &context, i, &error), &error);
        sharpness += (backward(batch, i, &perturbed_gradients[i]) - loss[i]) / TASKS;
        check(flatmtl_step_restore(step, &context, &error), &error);
      }
      stationary += check(flatmtl_step_finish(step, &context, &error), &error) == FLATMTL_PARETO_STATIONARY;
      check(flatmtl_step_update(step, &context, &shared_update, &error), &error);
      descend(&params.shared, &update, PIXELS, HIDDEN);
      for (int i = 0; i < TASKS; i++) {
        const network *from = flat ? &perturbed_gradients[i] : &loss_gradients[i];
        descend(&params.heads[i], &from->heads[i], HIDDEN, num_classes[i]);
      }
      flatmtl_record record;
      check(flatmtl_step_record(step, &record, &error), &error);
      conflicts += record.cosine_loss[1] < 0; /* of tasks 0 and 1 */
    }
    report(epoch, order, sharpness, conflicts, TRAIN / BATCH);
    if (stationary > 0) printf("       %d steps were Pareto-stationary\n", stationary);
  }
  free(context.workspace);
  free(memory);
  return EXIT_SUCCESS;
}
