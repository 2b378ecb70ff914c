"""Data-parallel F-MTL on handwritten digits: checkpoints every epoch, and goes on from the last one after a crash.

    torchrun --standalone --nproc-per-node=2 --max-restarts=2 examples/distributed/train.py --out runs/distributed

Two digits of scikit-learn's make a picture; task 1 names the left one, task 2 the right one. Every rank takes its part
of each batch. With `--kill-at N` rank 1 kills itself at step N of the first start; torchrun then starts all ranks again,
and they end with the parameters of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import flatmtl
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pictures import draw_pairs

CANVAS, BATCH, SEED = 10, 64, 0


def load_data(pictures: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test pictures, each from its own half of the digits."""
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(images))
    parts = []
    for half in (order[: len(order) // 2], order[len(order) // 2 :]):
        x, y = draw_pairs((images[half], labels[half]), (images[half], labels[half]), pictures, CANVAS, rng)
        parts += [x.float() / 16, y]
    return parts[0], parts[1], parts[2], parts[3]


class Network(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(CANVAS * CANVAS, width), nn.ReLU(), nn.Linear(width, width))
        self.heads = nn.ModuleList([nn.Linear(width, 10) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x).relu()
        return [head(features) for head in self.heads]


class Checkpoints:
    """One folder an epoch, and a file that names the last complete one."""

    def __init__(self, out: Path, model: nn.Module, optimizer: flatmtl.FlatMTL) -> None:
        self.out, self.model, self.optimizer = out, model, optimizer
        self.latest = out / "latest"

    def _state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "flatmtl": self.optimizer.flatmtl_state,  # what torch's helper leaves out
        }

    def save(self, epoch: int) -> None:
        dcp.save(self._state(), checkpoint_id=self.out / f"epoch-{epoch}")  # all ranks together
        if dist.get_rank() == 0:
            self.latest.with_suffix(".new").write_text(str(epoch))
            self.latest.with_suffix(".new").replace(self.latest)

    def load(self) -> int:
        """The number of epochs that are done."""
        if not self.latest.exists():
            return 0
        epoch = int(self.latest.read_text())
        state = self._state()
        dcp.load(state, checkpoint_id=self.out / f"epoch-{epoch}")
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        return epoch


def connect(backend: str) -> None:
    """As `init_process_group`, but a restart has keys of its own: torchrun's store still holds the addresses of the
    processes before, and a rank that is early would call one of those."""
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/distributed"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--kill-at", type=int, default=-1, help="the step at which rank 1 kills itself, once")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda" if cuda else "cpu")
    connect("nccl" if cuda else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()

    train_x, train_y, test_x, test_y = (part.to(device) for part in load_data(arguments.pictures))
    torch.manual_seed(SEED)
    model = DistributedDataParallel(Network().to(device))
    # The model is wrapped in DDP: sync="auto" averages over its ranks, as sync="exact".
    optimizer = flatmtl.FlatMTL(torch.optim.Adam(model.parameters(), lr=1e-3), aggregator="cagrad", rho=0.05)
    checkpoints = Checkpoints(arguments.out, model, optimizer)
    done = checkpoints.load()
    if rank == 0:
        print(f"start from epoch {done}, {size} ranks", flush=True)

    for epoch in range(done, arguments.epochs):
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH):
            mine = batch.chunk(size)[rank].to(device)
            x, y = train_x[mine], train_y[mine]
            first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
            if rank == 1 and first_start and optimizer.steps == arguments.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            losses = optimizer.step(lambda x=x, y=y: [F.cross_entropy(o, y[:, i]) for i, o in enumerate(model(x))])
        checkpoints.save(epoch + 1)
        with torch.no_grad():
            right = [100 * (o.argmax(1) == test_y[:, i]).float().mean().item() for i, o in enumerate(model(test_x))]
        if rank == 0:
            traffic = optimizer.last["traffic_bytes"] / 1e6
            print(
                f"epoch {epoch + 1}: losses {losses[0]:.3f} {losses[1]:.3f}, test accuracy {right[0]:.1f} % "
                f"{right[1]:.1f} %, {traffic:.2f} MB a step and rank",
                flush=True,
            )
    if rank == 0:
        flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).cpu()
        print("parameters:", hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16], flush=True)
    dist.barrier()  # nobody leaves while others still talk
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
