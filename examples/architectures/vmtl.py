"""Variational multi-task learning with Gumbel-softmax priors.

Shen et al., "Variational Multi-Task Learning with Gumbel-Softmax Priors", NeurIPS 2021.

The features z of an example and the classifier w_t of a task are Gaussian; the prior of each is a mixture of what the other
tasks believe, with mixing weights that every task learns by Gumbel-softmax. The loss of task t is the cross-entropy of
a sample plus the divergences of z and of w_t from their priors; as in the authors' code no gradient flows into the other
tasks through the prior, and a mixture is taken as the Gaussian with means and variances mixed (weights and squared weights).

Tasks share their classes but not their pictures: digits as they are, inverted, and noisy; the n-th pictures of a batch show
the same class in all tasks, which is where the priors of z come from. Simplified: fixed temperature, constant
weights of the divergences (the paper anneals both), one sample a step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Data, compare, digit_halves, np
from torch import Tensor, nn

Gaussian = tuple[Tensor, Tensor]  # mean and variance


def domains(train: int = 150, test: int = 600, seed: int = 0) -> Data:
    """Pictures N x 3 x 64, one of each task and all of one class; targets N x 3."""
    rng = np.random.default_rng(seed)
    parts: list[Tensor] = []
    for (images, labels), n in zip(digit_halves(seed), (train, test), strict=True):
        y = rng.integers(10, size=n)
        which = np.array([[rng.choice(np.flatnonzero(labels == c)) for _ in range(3)] for c in y])
        x = images[which].reshape(n, 3, 64) / 16.0
        x[:, 1] = 1 - x[:, 1]
        x[:, 2] += 0.5 * rng.standard_normal((n, 64))
        parts += [torch.from_numpy(x).float(), torch.from_numpy(np.repeat(y[:, None], 3, 1))]
    return Data(*parts)


def divergence(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p), element by element."""
    (m, v), (pm, pv) = q, p
    return 0.5 * ((pv / v).log() + (v + (m - pm).square()) / pv - 1)


class GaussianLinear(nn.Module):
    """A linear layer whose weights are independent Gaussians; the last column is the bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(0.1 * torch.randn(outputs, inputs + 1))
        self.raw = nn.Parameter(torch.full((outputs, inputs + 1), -3.0))  # softplus of it is the standard deviation

    def posterior(self) -> Gaussian:
        return self.mean, F.softplus(self.raw).square()

    def forward(self, x: Tensor) -> Gaussian:
        mean, variance = self.posterior()
        x = F.pad(x, (0, 1), value=1.0)
        return F.linear(x, mean), F.linear(x.square(), variance)  # local reparameterisation


class Network(nn.Module):
    def __init__(self, tasks: int = 3, width: int = 48, temperature: float = 0.5) -> None:
        super().__init__()
        self.temperature = temperature
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), GaussianLinear(64, width))
        self.classifiers = nn.ModuleList(GaussianLinear(width, 10) for _ in range(tasks))
        self.mixing = nn.ParameterList(torch.zeros(2, tasks - 1) for _ in range(tasks))  # logits for z, for w

    def sample(self, g: Gaussian) -> Tensor:
        return g[0] + g[1].sqrt() * torch.randn_like(g[0]) if self.training else g[0]

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Gaussian]]:
        """Outputs and posteriors of the features of each task."""
        features = [self.encoder(x[:, t]) for t in range(len(self.classifiers))]
        outputs = [
            self.sample(classify(self.sample(f))) for classify, f in zip(self.classifiers, features, strict=True)
        ]
        return outputs, features

    def prior(self, posteriors: list[Gaussian], task: int, kind: int) -> Gaussian:
        """The other tasks' posteriors, mixed by a sample of the task's Gumbel-softmax weights."""
        weights = F.gumbel_softmax(self.mixing[task][kind], self.temperature)
        others = [g for t, g in enumerate(posteriors) if t != task]
        means, variances = (torch.stack([g[i].detach() for g in others], -1) for i in range(2))
        return means @ weights, variances @ weights.square()


def losses(model: Network, x: Tensor, y: Tensor, kl_z: float = 1e-3, kl_w: float = 1e-4) -> list[Tensor]:
    outputs, features = model(x)
    classifiers = [layer.posterior() for layer in model.classifiers]
    values = []
    for t, output in enumerate(outputs):
        z = divergence(features[t], model.prior(features, t, 0)).sum(1).mean()
        w = divergence(classifiers[t], model.prior(classifiers, t, 1)).sum()
        values.append(F.cross_entropy(output, y[:, t]) + kl_z * z + kl_w * w)
    return values


@torch.no_grad()
def evaluate(model: Network, x: Tensor, y: Tensor) -> list[float]:
    return [100 * (o.argmax(1) == t).float().mean().item() for o, t in zip(model(x)[0], y.unbind(1), strict=True)]


if __name__ == "__main__":
    compare(Network, domains(), losses, evaluate=evaluate, epochs=25, lr=5e-3)
