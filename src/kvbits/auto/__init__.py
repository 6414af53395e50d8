"""A KV cache dtype chosen by what it loses on this model: measured once, kept in the user's cache directory."""
