"""Loads what the C++ program saved, and does the same fine-tuning in Python: the two models must be equal bit for bit.

python check.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import flatmtl
import torch
import torch.nn.functional as F
from network import accuracy


def finetune(folder: Path) -> torch.jit.ScriptModule:
    """finetune.cpp in Python."""
    model = torch.jit.load(folder / "model.pt")
    data = torch.load(folder / "data.pt")
    accuracy(model, data["test_x"], data["test_y"])  # as there: TorchScript optimizes by what it has seen run
    shared = [p for name, p in model.named_parameters() if name.startswith("trunk.")]
    optimizer = flatmtl.FlatMTL(
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), aggregator="cagrad", rho=0.05, shared=shared,
        modules=[model],
    )  # fmt: skip
    model.train()
    for step, batch in enumerate(data["batches"]):
        x, y = data["tune_x"][batch], data["tune_y"][batch]
        losses = optimizer.step(lambda x=x, y=y: [F.cross_entropy(out, y[:, i]) for i, out in enumerate(model(x))])
        if step % 20 == 0:
            print(f"step {step:3}: losses {losses[0].item():.9g} {losses[1].item():.9g}")
    return model


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    data = torch.load(folder / "data.pt")
    expected = finetune(folder)
    tuned = torch.jit.load(folder / "tuned.pt")
    left, right = accuracy(tuned, data["test_x"], data["test_y"])
    print(f"loaded in Python: {left:.1f} % left, {right:.1f} % right on pictures of the new scanner")
    different = [
        name
        for (name, a), b in zip(tuned.state_dict().items(), expected.state_dict().values(), strict=True)
        if not torch.equal(a, b)
    ]
    print(f"different from the fine-tuning in Python: {', '.join(different) or 'nothing, bit for bit'}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
