"""Where forward-mode AD is refused, with the reason.

torch.compile refuses an autograd.Function that defines `jvp`, so none here does, and torch's own
message would only say that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

_REASON = (
    "fusedkl has no forward-mode AD (torch.func.jvp, jacfwd and hessian, torch.autograd.forward_ad)"
    " of this function (kl_div has it). Reverse mode works twice: create_graph=True, or "
    "torch.func.jacrev(torch.func.jacrev(f)) for a Hessian. fisher_vector_product is the Hessian "
    "of either KL times a vector, where both rows are equal."
)


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args); NotImplementedError with the reason if an input has a tangent."""
    if torch.compiler.is_compiling():
        return function.apply(*args)
    try:
        return function.apply(*args)
    except NotImplementedError as error:
        if forward_ad._current_level < 0:
            raise
        raise NotImplementedError(_REASON) from error
