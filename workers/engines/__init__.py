"""Engines. An engine is an ASGI app plus a control handle; `base` says exactly what that means."""
