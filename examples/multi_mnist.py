"""The F-MTL paper's Multi-MNIST protocol: two objects in a picture, a task each, from idx files.

Multi-MNIST, Multi-Fashion: --data DIR with MNIST's or Fashion-MNIST's four files. Fashion+MNIST: --data and --data2; the left
object is from the first. Training and test pictures come from different files, so they share no source image.

Every epoch ends with a checkpoint; the same command again continues from it, bit for bit as if it had never stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import flatmtl
import numpy as np
import torch
import torch.nn.functional as F
import typer
from pictures import draw_pairs, find_idx, read_idx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

CANVAS = 36


def load(folders: list[Path], train: bool, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (uint8, count x 1 x 36 x 36) and labels (count x 2); the same for the same seed."""
    # Some collections hold a part of the training set under a name of its own.
    stems = ("train", "train10k") if train else ("t10k",)
    sources = []
    for folder in folders:
        images = read_idx(find_idx(folder, *(f"{s}-images-idx3-ubyte" for s in stems)))
        labels = read_idx(find_idx(folder, *(f"{s}-labels-idx1-ubyte" for s in stems)))
        if images.ndim != 3 or max(images.shape[1:]) > CANVAS or labels.shape != images.shape[:1]:
            raise ValueError(f"{folder}: images {images.shape} and labels {labels.shape} do not fit")
        sources.append((images, labels))
    rng = np.random.default_rng([seed, int(train)])
    return draw_pairs(sources[0], sources[-1], count, CANVAS, rng)


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18() -> tuple[nn.Module, int]:
    """ResNet-18's trunk for small grey pictures, and the number of its features."""
    layers: list[nn.Module] = [nn.Conv2d(1, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2, padding=1)]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 512


def lenet() -> tuple[nn.Module, int]:
    return nn.Sequential(
        nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(20 * 6 * 6, 50), nn.ReLU(),
    ), 50  # fmt: skip


class Network(nn.Module):
    def __init__(self, trunk: str) -> None:
        super().__init__()
        self.trunk, features = resnet18() if trunk == "resnet18" else lenet()
        self.heads = nn.ModuleList([nn.Linear(features, 10) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x)
        return [head(features) for head in self.heads]


def train_epoch(
    model: Network,
    optimizer: flatmtl.FlatMTL,
    x: Tensor,
    y: Tensor,
    batch: int,
    order: Tensor,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """One pass over the pictures; means of what the steps recorded."""
    device = next(model.parameters()).device
    model.train()
    records: dict[str, list[Tensor]] = {name: [] for name in ("losses", "sharpness", "cosine")}
    skipped = 0
    for chosen in order.split(batch):
        inputs, labels = x[chosen].to(device).float() / 255, y[chosen].to(device)
        optimizer.step(
            lambda inputs=inputs, labels=labels: [F.cross_entropy(o, labels[:, i]) for i, o in enumerate(model(inputs))]
        )
        advance()
        if optimizer.last["skipped"]:
            skipped += 1
            continue
        records["losses"].append(optimizer.last["losses"])
        records["sharpness"].append(optimizer.last["sharpness"])
        records["cosine"].append(optimizer.last["cosine_loss"][0, 1])
    if not records["losses"]:
        raise RuntimeError("every step of the epoch was skipped: no gradient was finite")
    return {
        "losses": torch.stack(records["losses"]).mean(0).tolist(),
        "sharpness": [v if v == v else None for v in torch.stack(records["sharpness"]).mean(0).tolist()],
        "conflicts": (torch.stack(records["cosine"]) < 0).double().mean().item(),
        "skipped": skipped,
    }


@torch.no_grad()
def evaluate(model: Network, x: Tensor, y: Tensor) -> dict[str, list[float]]:
    device = next(model.parameters()).device
    model.eval()
    right, loss = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for inputs, labels in zip(x.split(1000), y.split(1000), strict=True):
        targets = labels.to(device)
        for i, output in enumerate(model(inputs.to(device).float() / 255)):
            right[i] += (output.argmax(1) == targets[:, i]).sum().item()
            loss[i] += F.cross_entropy(output, targets[:, i], reduction="sum").item()
    return {"accuracy": (100 * right / len(x)).tolist(), "test_losses": (loss / len(x)).tolist()}


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: an interruption leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def make_aggregator(name: str, seed: int, c: float, alpha: float, weights: str | None) -> str | flatmtl.Aggregator:
    if name == "cagrad":
        return flatmtl.CAGrad(c=c)
    if name == "fairgrad":
        return flatmtl.FairGrad(alpha=alpha)
    if name == "fixed":
        if weights is None:
            raise typer.BadParameter("aggregator fixed needs --weights, for example --weights 0.3,0.7")
        return flatmtl.Fixed([float(w) for w in weights.split(",")])
    return name  # pcgrad draws by the optimizer's seed


class Trunk(str, Enum):
    resnet18 = "resnet18"
    lenet = "lenet"


class Norm(str, Enum):
    separate = "separate"
    joint = "joint"


class Combine(str, Enum):
    decomposed = "decomposed"
    direct = "direct"
    second = "second"
    each = "each"


class Scale(str, Enum):
    rms = "rms"
    none = "none"


class NonFinite(str, Enum):
    error = "raise"
    skip = "skip"


def main(
    data: Annotated[Path, typer.Option(help="Folder with the idx files, gzipped or not.")],
    data2: Annotated[Path | None, typer.Option(help="Folder for the right object, if it is another.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the record.")] = Path("runs/multi_mnist"),
    trunk: Annotated[Trunk, typer.Option()] = Trunk.resnet18,
    pictures: Annotated[int, typer.Option(min=2, help="Training pictures.")] = 120_000,
    test_pictures: Annotated[int, typer.Option(min=1)] = 20_000,
    epochs: Annotated[int, typer.Option(min=1)] = 200,
    batch: Annotated[int, typer.Option(min=2)] = 256,
    lr: Annotated[float, typer.Option(help="Of Adam.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, batches and draws.")] = 0,
    data_seed: Annotated[int, typer.Option(min=0, help="Of the pictures.")] = 0,
    aggregator: Annotated[
        str, typer.Option(help="sum, mean, fixed, mgda, pcgrad, cagrad, imtl_g, nash_mtl or fairgrad.")
    ] = "cagrad",
    c: Annotated[float, typer.Option(help="Of cagrad.")] = 0.4,
    alpha: Annotated[float, typer.Option(help="Of fairgrad.")] = 2.0,
    weights: Annotated[str | None, typer.Option(help="Of fixed: two numbers, separated by a comma.")] = None,
    rho: Annotated[
        float, typer.Option(min=0.0, help="Radius; 0 is plain aggregation. The authors: 2 with --adaptive.")
    ] = 0.05,
    rho_task: Annotated[float | None, typer.Option(min=0.0, help="Radius of the heads, if it is another.")] = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="ASAM.")] = False,
    eta: Annotated[float, typer.Option(min=0.0, help="Of ASAM.")] = 0.0,
    norm: Annotated[Norm, typer.Option(help="joint is the authors' Multi-MNIST code.")] = Norm.separate,
    combine: Annotated[Combine, typer.Option()] = Combine.decomposed,
    family_scale: Annotated[Scale, typer.Option()] = Scale.rms,
    replay_rng: Annotated[bool, typer.Option()] = True,
    nonfinite: Annotated[NonFinite, typer.Option()] = NonFinite.error,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...  [default: cuda if there is one]")] = None,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Stop after that many epochs of this call.")] = None,
) -> None:
    """Trains a two-task network on pictures of two objects, and continues where an earlier call stopped."""
    # What decides the result; a checkpoint of other settings is not continued. epochs and device may change.
    settings = {
        key: str(value) if isinstance(value, Path) else value.value if isinstance(value, Enum) else value
        for key, value in locals().items()
        if key not in ("out", "epochs", "device", "stop_after")
    }
    console = Console()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folders = [data, data2 or data]
    train_x, train_y = load(folders, True, pictures, data_seed)
    test_x, test_y = load(folders, False, test_pictures, data_seed)

    torch.manual_seed(seed)
    model = Network(trunk.value).to(where)
    optimizer = flatmtl.FlatMTL(
        torch.optim.Adam(model.parameters(), lr=lr),
        aggregator=make_aggregator(aggregator, seed, c, alpha, weights),
        rho=(rho, rho if rho_task is None else rho_task),
        adaptive=adaptive, eta=eta, norm=norm.value, combine=combine.value,
        family_scale=None if family_scale is Scale.none else family_scale.value,
        replay_rng=replay_rng, nonfinite=nonfinite.value, seed=seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    history: list[dict[str, Any]] = []

    out.mkdir(parents=True, exist_ok=True)
    checkpoint, record = out / "checkpoint.pt", out / "record.json"
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=where, weights_only=True)
        different = sorted(
            k for k in settings.keys() | saved["settings"].keys() if settings.get(k) != saved["settings"].get(k)
        )
        if different:
            raise typer.BadParameter(f"{checkpoint} was made with another {', '.join(different)}; choose another --out")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"].cpu())
        torch.set_rng_state(saved["rng"].cpu())
        history = saved["history"]
        console.print(f"continues {checkpoint} after epoch {len(history)}")

    last = epochs if stop_after is None else min(epochs, len(history) + stop_after)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        whole = progress.add_task("epochs", total=epochs, completed=len(history))
        steps = progress.add_task("steps of the epoch")
        while len(history) < last:
            order = torch.randperm(pictures, generator=generator)
            if pictures % batch == 1:  # BatchNorm cannot train on a single picture
                order = order[:-1]
            progress.reset(steps, total=-(-len(order) // batch))
            trained = train_epoch(model, optimizer, train_x, train_y, batch, order, lambda: progress.advance(steps))
            history.append({"epoch": len(history) + 1} | trained | evaluate(model, test_x, test_y))
            state = {
                "settings": settings, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(), "rng": torch.get_rng_state(), "history": history,
            }  # fmt: skip
            replace(checkpoint, lambda path, state=state: torch.save(state, path))
            text = json.dumps(
                {"flatmtl": flatmtl.__version__, "torch": torch.__version__} | settings | {"epochs": history}
            )
            replace(record, lambda path, text=text: path.write_text(text))
            progress.advance(whole)
            left, right = history[-1]["accuracy"]
            console.print(
                f"epoch {len(history):3}: test accuracy {left:5.2f} {right:5.2f} %, losses "
                f"{' '.join(f'{v:.4f}' for v in trained['losses'])}, conflicts {100 * trained['conflicts']:.0f} %"
            )
    console.print(f"Saved: {record}, {checkpoint}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
