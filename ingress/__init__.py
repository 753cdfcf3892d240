"""Request handling: OpenAI-compatible HTTP and SSE in front of the queue."""
