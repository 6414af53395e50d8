"""Continuous batching over the paged cache: requests in, tokens and text out."""
