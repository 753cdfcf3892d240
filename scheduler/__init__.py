"""Orchestration: the fleet's registry and health."""
