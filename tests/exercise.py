"""Uses the compiled ops from Python in every way once or twice, for runs under sanitizers; checks little itself.

python tests/exercise.py [--threads N] [--rounds N]
"""

from __future__ import annotations

import argparse
import contextlib
import io

import flatmtl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ops = torch.ops.flatmtl
GRADVAC = 9
AGGREGATORS = (
    "sum", "mean", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad", flatmtl.Fixed([1.0, 2.0, 0.5]),
    "gradvac", "aligned_mtl", "upgrad", "dualproj", "config", "ntkmtl", "graddrop", "moco", "db_mtl", "excess_mtl",
)  # fmt: skip
WEIGHTINGS = (
    "uw", "dwa", "rlw", "si", "gls", "stch", "imtl_l", "famo", "gradnorm", "go4align", "slaw", "bmtl", "emtl",
)  # fmt: skip


def steps(aggregator: object, dtype: torch.dtype, **options: object) -> None:
    torch.manual_seed(0)
    trunk = nn.Linear(40, 300, dtype=dtype)  # enough elements for several threads
    heads = nn.ModuleList(nn.Linear(300, 5, dtype=dtype) for _ in range(3))
    sgd = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.01, momentum=0.9)
    optimizer = flatmtl.FlatMTL(sgd, aggregator=aggregator, **options)
    x, y = torch.randn(16, 40, dtype=dtype), torch.randint(0, 5, (3, 16))

    def closure() -> list[Tensor]:
        z = torch.tanh(trunk(x))
        return [F.cross_entropy(head(z), target) for head, target in zip(heads, y, strict=True)]

    for _ in range(2):
        optimizer.step(closure)
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    with contextlib.suppress(flatmtl.NonFiniteError):
        optimizer.step(lambda: [loss * torch.nan for loss in closure()])


def rows(dtype: torch.dtype, tasks: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(tasks) for shape in ((3,), (0,), (), (2, 5), (100_003,))]


def every_op(dtype: torch.dtype) -> None:
    for tasks in (1, 2, 5):
        g, s, row = rows(dtype, tasks), rows(dtype, tasks), rows(dtype, 1)
        pair = ops.gramian_pair(g, s, tasks)
        gramian = ops.gramian(s, tasks)
        ops.sq_norms(g, tasks, row, 0.1)
        state = torch.zeros(4 * tasks * tasks + 16, dtype=torch.float64)
        for method in range(15):
            options = [1.0] * tasks if method == 2 else []
            if method == GRADVAC:
                ops.weights_(gramian, method, options, state[: tasks * tasks])
                ops.step_weights_(pair, gramian, method, options, 0, 1, state[: 2 * tasks * tasks])
                continue
            ops.weights(gramian, method, options)
            for combine in range(4):
                a, b, _ = ops.step_weights(pair, gramian, method, options, combine, 1)
        out, scale = [torch.empty_like(t) for t in row], [0.1] * len(row)
        ops.copy_(out, row)
        ops.perturb_(out, row, g[: len(row)], scale, True, 0.1)
        ops.combine_(out, g, tasks, a)
        ops.combine_pair_(out, g, s, tasks, a, b)
        ops.perturb(row, g[: len(row)], scale, False, 0.0)
        ops.combine(g, tasks, a)
        ops.combine_pair(g, s, tasks, a, b)
        ops.aggregate(g, tasks, 3, [])


def every_buffer_op(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for tasks in (1, 2, 5):
        g, s = rows(dtype, tasks), rows(dtype, tasks)
        out = [torch.empty_like(t) for t in g[: len(g) // tasks]]
        memory = [torch.zeros_like(t, dtype=wide) for t in g]
        one = torch.ones(tasks, dtype=torch.float64)
        for perturbed in ([], s):
            ops.moving_average_(memory, g, perturbed, tasks, one, one, one * 0.5)
            ops.excess_(memory, g, perturbed, tasks, one, one)
            ops.cross_gramian(g, perturbed, s, perturbed, tasks, one, one)
            ops.graddrop_(out, g, perturbed, tasks, one, one, one * 0.5, 1, 2, 3, 4)
        ops.combine_buffers_(out, memory, tasks, one)
        for method, vectors in enumerate((0, 2, 1, 3)):
            state = torch.zeros(vectors * tasks, dtype=torch.float64)
            ops.buffer_update(g, tasks, one, method, [], 0, memory if method else [], state)


def errors() -> None:
    good, bad = [torch.ones(3), torch.ones(2)], [torch.ones(3), torch.ones(4)]
    for call in (
        lambda: ops.gramian(good + bad, 2),
        lambda: ops.gramian(good, 0),
        lambda: ops.combine_(good, bad, 1, torch.ones(1).double()),
        lambda: ops.copy_(good, [good[0][:2], good[1]]),
        lambda: ops.weights(torch.full((2, 2), torch.nan).double(), 3, []),
        lambda: ops.weights(torch.eye(2).double(), 99, []),
        lambda: ops.aggregate([torch.ones(2) * torch.inf], 1, 3, []),
        lambda: ops.combine_buffers_(good, bad, 1, torch.ones(1).double()),
        lambda: ops.loss_weights(torch.zeros(2).double(), None, 4, [], torch.zeros(0).double()),
    ):
        with contextlib.suppress(RuntimeError):
            call()
            raise SystemExit("an error was expected")


def scripted() -> None:
    params = [torch.zeros(40, 3), torch.zeros(7)]
    optimizer = torch.jit.script(flatmtl.script.Adam(params, params[:1], lr=0.1))
    for _ in range(3):
        grads = [[torch.randn(40, 3), torch.randn(7)], [torch.randn(40, 3), None]]
        for task in range(2):
            optimizer.perturb(grads, task)
        optimizer.step(grads, grads)
    stream = io.BytesIO()
    torch.jit.save(optimizer, stream)
    stream.seek(0)
    torch.jit.load(stream).step(grads, grads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for _ in range(arguments.rounds):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            every_op(dtype)
            every_buffer_op(dtype)
        errors()
        for aggregator in AGGREGATORS:
            steps(aggregator, torch.float32)
        for weighting in WEIGHTINGS:
            steps("sum", torch.float32, weighting=weighting)
        for combine in ("direct", "second", "each"):
            steps("cagrad", torch.float64, combine=combine, adaptive=True, norm="joint")
        scripted()
    print("exercised")


if __name__ == "__main__":
    main()
