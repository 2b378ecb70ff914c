"""Trains the network with F-MTL, and saves it as TorchScript with the data that the deployed program will meet.

python train.py FOLDER [EPOCHS]      writes model.pt and data.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

import flatmtl
import torch
import torch.nn.functional as F
from network import Network, accuracy, load_data

BATCH = 50


def main(folder: Path, epochs: int = 12) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the network is too small to gain from more
    torch.manual_seed(0)
    data, model = load_data(), Network()
    optimizer = flatmtl.FlatMTL(torch.optim.Adam(model.parameters(), lr=1e-3), aggregator="cagrad", rho=0.05)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(data["train_x"])).split(BATCH):
            x, y = data["train_x"][batch], data["train_y"][batch]
            optimizer.step(lambda x=x, y=y: [F.cross_entropy(out, y[:, i]) for i, out in enumerate(model(x))])
    left, right = accuracy(model, data["train_x"], data["train_y"])
    print(f"trained: {left:.1f} % left, {right:.1f} % right on the training pictures")

    torch.jit.script(model).save(folder / "model.pt")
    # One row a step of the fine-tuning: which pictures make the batch.
    steps = torch.cat([torch.randperm(len(data["tune_x"])).reshape(-1, BATCH) for _ in range(10)])
    new = {name: data[name] for name in ("tune_x", "tune_y", "test_x", "test_y")}
    torch.save(new | {"batches": steps}, folder / "data.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
