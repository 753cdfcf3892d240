"""Inference: pull requests by credit, run them on an engine, stream frames back."""
