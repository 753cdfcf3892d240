from __future__ import annotations


class IntegrityError(Exception):
    """The books disagree with each other: a defect of ours, never of the input."""
