"""Speculative decoding: several tokens are guessed cheaply, and one step of the model checks them all."""

from kvbits.engine.speculation.config import SpeculativeConfig
from kvbits.engine.speculation.proposer import Candidate, Proposer
from kvbits.engine.speculation.speculator import Speculator
from kvbits.engine.speculation.stats import SpeculationStats

__all__ = ["Candidate", "Proposer", "SpeculationStats", "SpeculativeConfig", "Speculator"]
