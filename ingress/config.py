"""Settings of one ingress process."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from broker.messages import MAX_BODY, ServiceClass

_DEADLINES = {ServiceClass.INTERACTIVE: 600.0, ServiceClass.STANDARD: 600.0, ServiceClass.BATCH: 86400.0}


class IngressConfig(BaseModel):
    """`[ingress]`. Times in seconds, sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 or :: is every one")
    port: int = Field(8000, ge=0, le=65535, description="0 picks a free one")
    name: str = Field("", description="mailbox name; unique in the fleet; made up when empty")
    max_body: int = Field(32 * 2**20, ge=1024, le=MAX_BODY, description="larger bodies are refused (413)")
    max_large: int = Field(
        8,
        ge=1,
        description="bodies too large for a message that are received and stored at once; the next one "
        "waits, within body_timeout",
    )
    body_timeout: float = Field(30.0, gt=0, description="time for a client to send its body (408)")
    max_unread: int = Field(
        2**20,
        ge=2**16,
        description="bytes of a stream that may wait for its client; past that it is ended, to be read on",
    )
    write_timeout: float = Field(
        30.0, gt=0, description="time for a client to take anything of what waits; then it is disconnected"
    )
    keepalive: float = Field(5.0, gt=0, description="SSE comment interval while nothing else is sent")
    publish_timeout: float = Field(2.0, gt=0, description="time for the broker to accept (503)")
    drain_timeout: float = Field(30.0, ge=0, description="time for open streams to finish on SIGTERM")
    max_streams: int = Field(10_000, ge=1, description="requests open at once; one more is refused (429)")
    no_fallback: tuple[str, ...] = Field(
        (), description="tenants for whom no other model serves where the one they named is down or full"
    )
    deadlines: dict[ServiceClass, float] = Field(
        default=_DEADLINES, description="default life of a request, by class; a class left out keeps its own"
    )
    api_keys: dict[str, SecretStr] = Field(
        default={}, description="tenant -> key, environment only; empty = everyone is anonymous"
    )

    @field_validator("deadlines")
    @classmethod
    def _complete(cls, given: dict[ServiceClass, float]) -> dict[ServiceClass, float]:
        return _DEADLINES | given

    @field_validator("api_keys")
    @classmethod
    def _usable(cls, given: dict[str, SecretStr]) -> dict[str, SecretStr]:
        keys = [key.get_secret_value() for key in given.values()]
        if not all(given) or not all(key.strip() for key in keys):
            raise ValueError("a tenant or its key is empty: who sends no key would be let in")
        if len(set(keys)) < len(keys):
            raise ValueError("two tenants share a key: each needs its own")
        return given
