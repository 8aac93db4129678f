"""Second derivatives of a KL in closed form: the Fisher matrix of a row of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from . import contents, reference, validation
from .autograd import intercepted
from .layout import inverse_temperature, row_parts, rows


def fisher_vector_product(
    logits: Tensor, vector: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """F v for every row, F = (diag(p) - p p^T) / T^2 with p = softmax(logits / T).

    F is the Fisher information of the row, and the Hessian of either KL in either row's logits
    where the two rows are equal: the matrix of a trust-region or natural-gradient step. It is
    symmetric, positive semidefinite, and takes constants to 0. Equivalent to::

        p = torch.softmax(logits.double() / T, -1)
        p * (vector - (p * vector).sum(-1, keepdim=True)) / T**2

    For a model with parameters w, F of w is J^T F J: `torch.func.jvp` gives J v, this function F J
    v, a backward through the model the rest (examples/trpo.py). Hessians elsewhere than at equal
    rows come from double backward through the divergences.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64; -inf counts as probability 0.
            Differentiable.
        vector: the shape and device of logits, floating-point. Differentiable, any number of times.
        temperature: T > 0, a number or a float tensor, 0-d or of shape logits.shape[:-1].

    Returns:
        [..., V] in vector's dtype, nats per unit of a logit, float64 inside, computed over blocks
        of rows: nothing else of that size is allocated unless autograd records. A row of logits
        with NaN, +inf or nothing but -inf is NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Amari, "Natural Gradient Works Efficiently in Learning", 1998; Schulman et al., "Trust Region
    Policy Optimization", 2015, appendix C.
    """
    validation.logits("logits", logits)
    validation.floating("vector", vector)
    validation.alike("vector", vector, "logits", logits)
    inverse = inverse_temperature(temperature, logits)
    if inverse is not None and logits.device.type == "cpu" and not intercepted(inverse):
        contents.temperatures(inverse, None)
    dtype = reference.inside(logits.device)
    x, v = rows(logits), rows(vector)
    one_each = (*x.shape[:-1], 1)
    if inverse is None:
        inverse = torch.ones(1, dtype=dtype, device=x.device)
    scale = inverse.expand(one_each) if inverse.numel() == 1 else inverse.view(one_each)
    recorded = torch.is_grad_enabled() and (logits.requires_grad or vector.requires_grad)
    # a batch of torch.func has no room in a plain result, and a graph no loop over unknown rows
    transformed = torch._C._are_functorch_transforms_active()
    if recorded or transformed or torch.compiler.is_compiling():
        return _product(x, v, scale).reshape(vector.shape)
    out = v.new_empty(v.shape)
    for _, to, block_x, block_v, block_scale in row_parts(out, x, v, scale):
        to.copy_(_product(block_x, block_v, block_scale))
    return out.reshape(vector.shape)


def _product(x: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return reference.fisher_vector(x.to(scale.dtype), v.to(scale.dtype), scale).to(v.dtype)
