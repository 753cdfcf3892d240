"""Request bodies that are too large for a message: they lie in the object store `payloads`, and the request
names them in its header `Body-Object`.

Who takes a request out of the queue takes its body away: a worker after its ack, an ingress or the scheduler
after deleting the message; never sooner, since a redelivery must find it. What a crash leaves behind goes
by its age, `broker.payload_age`. A dead letter's body stays until then.
"""

from __future__ import annotations

import dataclasses
import logging
import uuid

from broker import base, errors, objects, subjects
from broker.messages import MAX_BODY, Request

_log = logging.getLogger(__name__)

_HEADER_ROOM = 5120
"""Bytes of a message kept free for its headers."""


def room(broker: base.Broker) -> int:
    """Bytes of a body that still goes into its message."""
    return broker.max_payload - _HEADER_ROOM


def size(broker: base.Broker, request: Request) -> int:
    """Bytes of its body; of one that is still in the store the fewest that bring a body there."""
    return len(request.body) or (room(broker) if request.body_object else 0)


async def stow(broker: base.Broker, request: Request) -> Request:
    """`request` as it can be published: a body without room in its message is in the store then.

    Raises errors.Overloaded when the store is full, errors.Unavailable; nothing is kept then.
    """
    if len(request.body) <= room(broker):
        return request
    return await put_away(broker, request)


async def put_away(broker: base.Broker, request: Request) -> Request:
    """`request` with its body in the store, however small. Raises as `stow` does."""
    name = subjects.body_object(request.subject.tenant, uuid.uuid4().hex)
    try:
        await objects.put(broker, subjects.PAYLOADS, name, request.body)
    except errors.Overloaded as exc:
        raise errors.Overloaded(
            f"the store for bodies of more than {room(broker):,} bytes is full: try again later",
            retry_after=5.0,
        ) from exc
    return dataclasses.replace(request, body=b"", body_object=name)


async def load(broker: base.Broker, request: Request) -> Request:
    """`request` with its body, which stays in the store. Costs nothing where the message had it.

    Raises errors.BodyLost when it isn't there, errors.TooLarge, errors.Unavailable.
    """
    if not request.body_object:
        return request
    try:
        body = await objects.get(broker, subjects.PAYLOADS, request.body_object, MAX_BODY)
    except objects.Missing as exc:
        raise errors.BodyLost(
            f"the body of the request can't be read: in bucket {subjects.PAYLOADS} {exc}; store it before "
            "publishing, and under a new name each time"
        ) from exc
    return dataclasses.replace(request, body=body)


async def discard(broker: base.Broker, request: Request) -> None:
    """Take the body out of the store. Never raises: what can't be removed now goes by its age."""
    if not request.body_object:
        return
    try:
        await objects.remove(broker, subjects.PAYLOADS, request.body_object)
    except errors.HeadraceError as exc:
        _log.warning(
            "a stored body stays until its age: %s", exc.message, extra={"request_id": request.request_id}
        )
