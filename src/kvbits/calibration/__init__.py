"""Fit a cache policy to a model and a text."""
