"""torch.compile recognises KL divergences that are written out, and runs them fused.

    fusedkl.inductor.enable()          with fusedkl.inductor.enable():
    step = torch.compile(step)             step(...)  # compiled here

See docs/dropin.md for what is recognised. Nothing happens before `enable()`.
"""

from __future__ import annotations

from .control import Enabled, disable, enable
from .report import Miss, Report, Rewrite, report

__all__ = ["Enabled", "Miss", "Report", "Rewrite", "disable", "enable", "report"]
