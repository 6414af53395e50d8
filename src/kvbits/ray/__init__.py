"""Replicas of the engine on Ray Serve: one OpenAI-compatible address, many machines. Needs ``kvbits[ray]``."""
