"""Composition root: command line, settings, logs, and the pieces that put a fleet on one machine."""
