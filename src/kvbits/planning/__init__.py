"""What fits: arithmetic over a model's geometry, cache policies, memory and traffic. Allocates no cache.

Names are imported when they are used: the tables and configurations need no torch.
"""

from typing import TYPE_CHECKING

from kvbits.lazy import lazily

if TYPE_CHECKING:
    from kvbits.planning.core import ContextPlan, Plan, SchemePlan, plan

__all__ = ["ContextPlan", "Plan", "SchemePlan", "plan"]

__getattr__ = lazily(__name__, dict.fromkeys(__all__, "kvbits.planning.core"))
