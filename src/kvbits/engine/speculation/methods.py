"""The proposer of each method."""

from __future__ import annotations

from kvbits.config import EngineConfig
from kvbits.engine.speculation.config import SpeculativeConfig
from kvbits.engine.speculation.ngram import NgramProposer
from kvbits.engine.speculation.proposer import Proposer
from kvbits.models import LoadedModel


def proposer_of(speculative: SpeculativeConfig, loaded: LoadedModel, config: EngineConfig) -> Proposer:
    """What guesses tokens for ``loaded``. Raises ``ConfigError`` where the method does not fit the model."""
    return NgramProposer(speculative.prompt_lookup_min, speculative.prompt_lookup_max)
