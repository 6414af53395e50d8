"""What fits: arithmetic over a model's geometry, cache policies, memory and traffic. Allocates no cache."""

from kvbits.planning.core import ContextPlan, Plan, SchemePlan, plan

__all__ = ["ContextPlan", "Plan", "SchemePlan", "plan"]
