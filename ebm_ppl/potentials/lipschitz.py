"""Layers whose Lipschitz constant is bounded: spectral normalisation without a state."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_count, check_one
from ebm_ppl.types import Array, Key, Scalar


def spectral_norm_bound(matrix: Array, num_iterations: int = 6) -> Scalar:
    """An upper bound of the largest singular value, by Gram iteration: ``||W||_2 <= ||(W' W)^(2^(m-1))||_F^(1 / 2^m)``.

    Each of the ``m`` iterations squares the Gram matrix; the factor by which the bound is too large is at most
    ``rank^(1 / 2^(m+1))``: 1.04 for a rank of 128 at the default. It is differentiable, and needs no vectors that would
    have to be carried from call to call as those of power iteration.

    Args:
        matrix: ``(out, in)``.
        num_iterations: Iterations ``m``.

    Example:
        >>> round(float(spectral_norm_bound(jnp.diag(jnp.array([3.0, 1.0])))), 4)
        3.0

    References:
        Delattre, Barthelemy, Araujo, Allauzen (2023), Efficient bound of Lipschitz constant for convolutional layers by
        Gram iteration, arXiv:2305.16173, algorithm 1.
    """
    is_zero = jnp.all(matrix == 0.0)
    gram, log_scale = _rescaled(jnp.where(is_zero, 1.0, matrix))
    gram = gram @ gram.T if matrix.shape[0] <= matrix.shape[1] else gram.T @ gram
    log_scale = 2.0 * log_scale
    for _ in range(num_iterations - 1):
        gram, step = _rescaled(gram)
        gram, log_scale = gram @ gram, 2.0 * (log_scale + step)
    log_norm = log_scale + 0.5 * jnp.log(jnp.sum(gram**2))
    return jnp.where(is_zero, 0.0, jnp.exp(log_norm / 2.0**num_iterations))


def _rescaled(matrix: Array) -> tuple[Array, Scalar]:
    """A matrix over its largest entry, and the logarithm of that: squares would overflow.

    What is divided out here is put back at the end, whatever it is: as a constant it leaves the gradient exact.
    """
    scale = jax.lax.stop_gradient(jnp.abs(matrix).max())
    return matrix / scale, jnp.log(scale)


class SpectralNorm(eqx.Module):
    """A linear or convolutional layer whose weight is scaled down until its Lipschitz constant is at most ``bound``.

    ``W bound / max(bound, s)``, where ``s`` bounds the operator norm from above (:func:`spectral_norm_bound`; of a
    convolution the norm of its kernel as a matrix, times the square root of the number of patches that a pixel can be
    part of). A smaller weight is left as it is, so zeros are allowed. A network of such layers, and so the force on a
    chain, is bounded everywhere; an energy of it, tilted by a Gaussian base, is a proper density.

    Args:
        layer: An ``equinox.nn.Linear`` or ``equinox.nn.Conv``.
        bound: The bound, a constant of training.
        num_iterations: Gram iterations; see :func:`spectral_norm_bound`.

    Raises:
        TypeError: the layer is of another kind.
        ValueError: ``bound`` is not finite and positive.

    Example:
        >>> layer = SpectralNorm(eqx.nn.Linear(4, 3, key=jax.random.key(0)), bound=0.5)
        >>> bool(jnp.linalg.norm(layer.weight, 2) <= 0.5)
        True

    References:
        Miyato, Kataoka, Koyama, Yoshida (2018), Spectral normalization for generative adversarial networks,
        arXiv:1802.05957; Gouk, Frank, Pfahringer, Cree (2021), arXiv:1804.04368 (scaling down only).
    """

    layer: Any
    bound: float = eqx.field(static=True)
    num_iterations: int = eqx.field(static=True)

    def __init__(self, layer: eqx.nn.Linear | eqx.nn.Conv, bound: float = 1.0, num_iterations: int = 6):
        if not isinstance(layer, eqx.nn.Linear | eqx.nn.Conv):
            raise TypeError(f"layer: got {type(layer).__name__}, expected an equinox.nn.Linear or equinox.nn.Conv.")
        check_one("bound", bound, lambda x: jnp.isfinite(x) & (x > 0.0), "a finite number > 0")
        self.layer, self.bound = layer, float(bound)
        self.num_iterations = check_count("num_iterations", num_iterations)

    @property
    def weight(self) -> Array:
        """The weight that is used."""
        weight = self.layer.weight
        bound = spectral_norm_bound(weight.reshape(weight.shape[0], -1), self.num_iterations) * self._overlap
        return weight * (self.bound / jnp.maximum(self.bound, bound))

    @property
    def _overlap(self) -> float:
        """Norm of the map from an image to its patches."""
        if isinstance(self.layer, eqx.nn.Linear):
            return 1.0
        sizes = zip(self.layer.kernel_size, self.layer.stride, strict=True)
        return math.sqrt(math.prod(math.ceil(kernel / stride) for kernel, stride in sizes))

    def __call__(self, inputs: Array, *, key: Key | None = None) -> Array:
        """The layer at one input."""
        return eqx.tree_at(lambda layer: layer.weight, self.layer, self.weight)(inputs)
