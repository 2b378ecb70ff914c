"""Helpers for methods that work beside the step: asymmetric transfer between tasks, weights from auxiliary runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["AMTFL", "mean_contributions", "visatb_weights"]


class AMTFL(nn.Module):
    r"""Asymmetric multi-task feature learning with task uncertainty (Deep-AMTFL, 1708.00260; uncertainty, 2012.09575).

    Tasks feed their outputs back to the shared features z: :math:`\hat z = \sigma(\sum_i o_i B_i)`, where :math:`o_i` is
    the output of task i before its nonlinearity. A task pays for what it feeds back in proportion to its loss, so that
    reliable tasks shape the features and unreliable ones mostly read them. With losses :math:`L_i` and
    :math:`s_i = \ln \sigma_i^2` learned:

    .. math::
        l_i &= (1 + \alpha \|B_i\|_1)\, e^{-s_i} L_i + \tfrac12 s_i \\
        r &= \gamma\, \frac1N \sum_n \| z_n - \hat z_n \|^2

    Reconstructed: both papers were read as abstracts; the objective is the published form from memory. The log term
    stands outside the bracket: within it, a task with a negative :math:`e^{-s} L + s/2` would earn by feeding
    back more, without bound. The reconstruction error is a mean over the batch where AMTFL has a sum over the training
    set, which only scales :math:`\gamma`. The l1 penalty on the heads is left to the optimizer's weight decay.

    The terms :math:`l_i` are losses for `FlatMTL` like any others; r is one more, or is added to them in equal parts. r
    reaches every head, so that the heads count as shared parameters then: that is what feeding back means.

    Args:
        features: width of z.
        outputs: width of each task's output :math:`o_i`.
        alpha: price of feeding back, >= 0.
        gamma: weight of the reconstruction, >= 0.
        uncertainty: learn :math:`s_i` (2012.09575); False is AMTFL proper, :math:`s_i = 0`.
        nonlinearity: :math:`\sigma`, that of the layer which makes z.

    The module's parameters (:math:`B_i`, `feedback`; :math:`s_i`, `log_variance`) belong into the optimizer, too.

    Example:
        >>> amtfl = AMTFL(64, [10, 2])
        >>> optimizer = FlatMTL(torch.optim.Adam([*model.parameters(), *amtfl.parameters()]))
        >>> def closure():
        ...     z = model.trunk(x)
        ...     outputs = [head(z) for head in model.heads]
        ...     losses, reconstruction = amtfl(z, outputs, [F.cross_entropy(o, t) for o, t in zip(outputs, y)])
        ...     return [loss + reconstruction / len(losses) for loss in losses]
    """

    def __init__(
        self,
        features: int,
        outputs: Sequence[int],
        *,
        alpha: float = 0.1,
        gamma: float = 0.1,
        uncertainty: bool = True,
        nonlinearity: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        super().__init__()
        if features < 1 or len(outputs) == 0 or min(outputs) < 1:
            raise ValueError(f"features and outputs must be positive, but are {features} and {list(outputs)}")
        for name, value in (("alpha", alpha), ("gamma", gamma)):
            if not (isinstance(value, (int, float)) and 0.0 <= value < float("inf")):
                raise ValueError(f"{name} must be a finite number >= 0, but is {value!r}")
        self.alpha, self.gamma, self.nonlinearity = float(alpha), float(gamma), nonlinearity
        bound = sum(outputs) ** -0.5
        self.feedback = nn.ParameterList(torch.empty(width, features).uniform_(-bound, bound) for width in outputs)
        self.log_variance = nn.Parameter(torch.zeros(len(outputs)), requires_grad=uncertainty)

    def forward(
        self, features: Tensor, outputs: Sequence[Tensor], losses: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """The terms :math:`l_i` and r.

        Args:
            features: z, (N, features), after the nonlinearity.
            outputs: K tensors (N, outputs[i]), before theirs.
            losses: K scalars.
        """
        tasks = len(self.feedback)
        for name, given in (("outputs", outputs), ("losses", losses)):
            if len(given) != tasks:
                raise ValueError(f"{name} has {len(given)} entries, but there are {tasks} tasks")
        price = [1.0 + self.alpha * b.abs().sum() for b in self.feedback]
        terms = [
            price[i] * torch.exp(-self.log_variance[i]) * loss + 0.5 * self.log_variance[i]
            for i, loss in enumerate(losses)
        ]
        fed_back = torch.stack([o @ b for o, b in zip(outputs, self.feedback, strict=True)]).sum(0)
        error = (features - self.nonlinearity(fed_back)).square().sum(-1).mean()
        return terms, self.gamma * error


def mean_contributions(matrix: Tensor | Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """What each task gives to the others and receives from them, from a K x K matrix of contributions.

    Args:
        matrix: entry (i, j) says how much learning task i does for task j, measured on validation data, such as the
            metric on j of a model trained on i alone, relative to that of a model trained on j. The diagonal is ignored.

    Returns:
        (given, received), K each, float64: means over the other tasks along rows and along columns.

    Reconstructed: the vectors in the authors' code have equal sums, as the row and column means of one matrix have; how
    they measure an entry was not to be read.
    """
    c = torch.as_tensor(matrix, dtype=torch.float64)
    if c.dim() != 2 or c.shape[0] != c.shape[1] or c.shape[0] < 2:
        raise ValueError(f"matrix must be K x K with K >= 2, but has shape {tuple(c.shape)}")
    others = c.masked_fill(torch.eye(len(c), dtype=torch.bool, device=c.device), 0.0)
    if not bool(torch.isfinite(others).all()):
        i, j = (int(k) for k in (~torch.isfinite(others)).nonzero()[0])
        raise ValueError(f"matrix[{i}, {j}] is {others[i, j].item()}")
    return others.sum(1) / (len(c) - 1), others.sum(0) / (len(c) - 1)


def visatb_weights(
    given: Tensor | Sequence[float],
    received: Tensor | Sequence[float],
    performance: Tensor | Sequence[float],
    *,
    temperature: float = 0.5,
) -> Tensor:
    r"""Task weights from inter-task contribution and intra-task difficulty: CoTBal, later VisATB (2403.04343).

    .. math::
        w = \tfrac12 \Big( \tfrac12 \big(K\,\text{softmax}(c^{out} / \tau) + K\,\text{softmax}(-c^{in} / \tau)\big)
            + K\,\text{softmax}((1 - d) / \tau) \Big)

    Tasks that help others, are helped little, and are far from solved weigh more. The weights are positive, sum to K, and are
    fixed before training: ``flatmtl.Fixed(visatb_weights(...).tolist())``. They need auxiliary trainings: one a task for the
    contributions, and what the performance is relative to. The formula and :math:`\tau = 0.5` are those of the authors' code.

    Args:
        given: :math:`c^{out}`, K, what each task contributes to the others; see `mean_contributions`.
        received: :math:`c^{in}`, K, what each task receives from them.
        performance: d, K, relative validation performance of each task, 1 where it is solved.
        temperature: :math:`\tau` > 0.

    Returns:
        K weights, float64.
    """
    vectors = {"given": given, "received": received, "performance": performance}
    tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in vectors.items()}
    for name, t in tensors.items():
        if t.dim() != 1 or len(t) == 0 or len(t) != len(tensors["given"]):
            raise ValueError(f"{name} must have one number a task, but has shape {tuple(t.shape)}")
        if not bool(torch.isfinite(t).all()):
            i = int((~torch.isfinite(t)).nonzero()[0])
            raise ValueError(f"{name}[{i}] is {t[i].item()}")
    if not (isinstance(temperature, (int, float)) and 0.0 < temperature < float("inf")):
        raise ValueError(f"temperature must be a finite number > 0, but is {temperature!r}")
    signed = (tensors["given"], -tensors["received"], 1.0 - tensors["performance"])
    out, back, difficulty = (len(t) * torch.softmax(t / temperature, 0) for t in signed)
    return 0.5 * (0.5 * (out + back) + difficulty)
