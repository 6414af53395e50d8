"""Bridges to other engines: calibrated FP8 scales in their checkpoints, and a policy in their options."""
