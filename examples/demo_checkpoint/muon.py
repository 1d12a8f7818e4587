"""The optimiser Muon (Jordan et al. 2024): it orthogonalises the momentum of matrices, and uses Adam for all else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from examples.demo_checkpoint.training import PRODUCTS

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix. matrix: [..., m, n]; each matrix of a stack by itself."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).to(PRODUCTS)
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for matrices and (flattened) convolutions, with updates of RMS 0.2 x lr, which AdamW's have; Adam for the rest.

    Args:
        adam: parameters that have the shape of a matrix but are none, such as embeddings.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
        adam: Iterable[Tensor] = (),
    ) -> None:
        by_adam = {id(p) for p in adam}
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for p in params:
            plain = p.ndim < 2 or min(p.shape[-2:] if p.ndim == 3 else (p.shape[0], p[0].numel())) <= 3
            (rest if plain or id(p) in by_adam else matrices).append(p)
        groups = [{"params": g, "muon": kind} for g, kind in ((matrices, True), (rest, False)) if g]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    (self._muon if group["muon"] else self._adam)(p, self.state[p], group)

    def _muon(self, p: Tensor, state: dict[str, Tensor], group: dict[str, float]) -> None:
        gradient = p.grad
        assert gradient is not None
        buffer = state.setdefault("momentum", torch.zeros_like(gradient))
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(buffer, group["momentum"])
        matrix = update if update.ndim == 3 else update.reshape(len(update), -1)
        matrix = orthogonalise(matrix)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(matrix.reshape(p.shape), alpha=-group["lr"] * 0.2 * max(matrix.shape[-2:]) ** 0.5)

    def _adam(self, p: Tensor, state: dict[str, Tensor], group: dict[str, tuple[float, float]]) -> None:
        gradient = p.grad
        assert gradient is not None
        first, second = group["betas"]
        count = state.setdefault("step", torch.zeros(()))
        count += 1
        mean = state.setdefault("mean", torch.zeros_like(gradient))
        square = state.setdefault("square", torch.zeros_like(gradient))
        mean.lerp_(gradient, 1 - first)
        square.lerp_(gradient * gradient, 1 - second)
        t = float(count)
        scale = (square / (1 - second**t)).sqrt_().add_(1e-8)
        p.addcdiv_(mean / (1 - first**t), scale, value=-float(group["lr"]))  # type: ignore[arg-type]
