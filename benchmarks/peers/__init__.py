"""Other engines on the same model and machine: an installer kept apart from kvbits, and one adapter per engine."""
