"""Muon for the matrices inside the layers, Adam for the embedding and the norms.

Owns the moments of both. Matrices of one shape are orthogonalised together, as one batch.
Muon: Jordan et al., https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

import mlx.core as mx

from .network import Parameters

MUON_RATE, MUON_MOMENTUM = 0.02, 0.95
ADAM_RATE, ADAM_BETAS, ADAM_EPSILON = 3e-3, (0.9, 0.95), 1e-8
WARM_UP_STEPS = 50
LARGEST_GRADIENT = 1.0


def rate_at(step: int, num_steps: int, decay_share: float) -> float:
    """Return the factor on both learning rates: warm-up, level, then linear to 0."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    left = (num_steps - step) / max(1.0, decay_share * num_steps)
    return min(warm, left, 1.0)


def _orthogonalised(x: mx.array) -> mx.array:
    """Return the nearest semi-orthogonal matrices to x [batch, rows, columns], rows <= columns.

    Five Newton-Schulz steps with the coefficients of the Muon paper.
    """
    x = x / (mx.sqrt(mx.sum(mx.square(x), axis=(1, 2), keepdims=True)) + 1e-7)
    for _ in range(5):
        a = x @ x.swapaxes(1, 2)
        b = -4.7750 * a + 2.0315 * (a @ a)
        x = 3.4445 * x + b @ x
    return x


class Optimiser:
    """Updates parameters from gradients; `state` is all that must be saved to go on later."""

    def __init__(self, parameters: Parameters) -> None:
        self._matrices = sorted(name for name in parameters if "_proj" in name)
        self._others = sorted(name for name in parameters if "_proj" not in name)
        self.state: Parameters = {}
        for name in self._matrices:
            self.state[f"momentum.{name}"] = mx.zeros_like(parameters[name])
        for name in self._others:
            self.state[f"first.{name}"] = mx.zeros_like(parameters[name])
            self.state[f"second.{name}"] = mx.zeros_like(parameters[name])

    def updated(
        self, parameters: Parameters, gradients: Parameters, step: int, rate: float
    ) -> Parameters:
        """Return the parameters after one step; `step` counts from 0."""
        norm = mx.sqrt(mx.stack([mx.sum(mx.square(g)) for g in gradients.values()]).sum())
        clip = mx.minimum(1.0, LARGEST_GRADIENT / (norm + 1e-6))
        updated = dict(parameters)
        self._adam(updated, gradients, clip, step, rate)
        self._muon(updated, gradients, clip, rate)
        return updated

    def _adam(
        self, updated: Parameters, gradients: Parameters, clip: mx.array, step: int, rate: float
    ) -> None:
        one, two = ADAM_BETAS
        for name in self._others:
            gradient = gradients[name] * clip
            first = one * self.state[f"first.{name}"] + (1 - one) * gradient
            second = two * self.state[f"second.{name}"] + (1 - two) * mx.square(gradient)
            self.state[f"first.{name}"], self.state[f"second.{name}"] = first, second
            direction = first / (1 - one ** (step + 1))
            size = mx.sqrt(second / (1 - two ** (step + 1))) + ADAM_EPSILON
            updated[name] = updated[name] - ADAM_RATE * rate * direction / size

    def _muon(
        self, updated: Parameters, gradients: Parameters, clip: mx.array, rate: float
    ) -> None:
        groups: dict[tuple[int, int], list[str]] = {}
        directions: Parameters = {}
        for name in self._matrices:
            gradient = gradients[name] * clip
            momentum = MUON_MOMENTUM * self.state[f"momentum.{name}"] + gradient
            self.state[f"momentum.{name}"] = momentum
            direction = gradient + MUON_MOMENTUM * momentum
            rows, columns = direction.shape
            directions[name] = direction.T if rows > columns else direction
            groups.setdefault((min(rows, columns), max(rows, columns)), []).append(name)
        for names in groups.values():
            for name, direction in zip(
                names, _orthogonalised(mx.stack([directions[n] for n in names])), strict=True
            ):
                rows, columns = updated[name].shape
                change = direction.T if rows > columns else direction
                scale = max(1.0, rows / columns) ** 0.5
                updated[name] = updated[name] - MUON_RATE * rate * scale * change
