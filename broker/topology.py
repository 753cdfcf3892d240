"""The streams and buckets, made or brought up to date; idempotent, so every process may do it."""

from __future__ import annotations

import dataclasses
import logging

from nats.js import JetStreamContext, api
from nats.js.errors import APIError, NotFoundError

from broker import errors, subjects
from broker.config import BrokerConfig

_log = logging.getLogger(__name__)

_NAME_IN_USE = 10058
_NO_ROOM = 10047  # told before the name in use, so of a stream too that has its place already


def streams(config: BrokerConfig) -> list[api.StreamConfig]:
    return [
        api.StreamConfig(
            name=subjects.REQUESTS,
            subjects=[subjects.ALL_REQUESTS],
            retention=api.RetentionPolicy.WORK_QUEUE,
            storage=api.StorageType.FILE,
            # A full queue refuses the newcomer: what was accepted is never thrown away.
            discard=api.DiscardPolicy.NEW,
            max_msgs=config.max_queued,
            max_bytes=config.max_queued_bytes,
            duplicate_window=config.dedup_window,
            num_replicas=config.replicas,
            allow_direct=True,
        ),
        api.StreamConfig(
            name=subjects.REPLIES,
            subjects=[subjects.ALL_REPLIES],
            storage=api.StorageType.MEMORY,
            discard=api.DiscardPolicy.OLD,
            # Acknowledged where asked for, which the last frame of a reply is (`replies.Writer.kept`).
            max_bytes=config.journal_bytes,
            max_age=config.journal_age,
            num_replicas=config.replicas,
            allow_direct=True,
        ),
        api.StreamConfig(
            name=subjects.USAGE,
            subjects=[subjects.ALL_USAGE],
            storage=api.StorageType.FILE,
            no_ack=True,
            # Synced in batches: a sync for each event would stand in line with the queue's own.
            persist_mode=None if config.replicas > 1 else api.PersistMode.ASYNC,
            duplicate_window=min(config.dedup_window, config.usage_age),
            max_bytes=config.usage_bytes,
            max_age=config.usage_age,
            num_replicas=config.replicas,
            allow_direct=True,
        ),
        api.StreamConfig(
            # An object store to every NATS client: `nats object put` writes into it too.
            name=subjects.objects(subjects.PAYLOADS),
            subjects=[subjects.all_objects(subjects.PAYLOADS)],
            storage=api.StorageType.FILE,
            discard=api.DiscardPolicy.NEW,
            max_bytes=config.payload_bytes,
            max_age=config.payload_age,
            num_replicas=config.replicas,
            allow_rollup_hdrs=True,
            allow_direct=True,
        ),
        api.StreamConfig(
            name=subjects.objects(subjects.ARTIFACTS),
            subjects=[subjects.all_objects(subjects.ARTIFACTS)],
            storage=api.StorageType.FILE,
            discard=api.DiscardPolicy.NEW,
            max_bytes=config.artifact_bytes,
            num_replicas=config.replicas,
            allow_rollup_hdrs=True,
            allow_direct=True,
        ),
        api.StreamConfig(
            name=subjects.DEAD,
            subjects=[subjects.ALL_DEAD],
            storage=api.StorageType.FILE,
            duplicate_window=min(config.dedup_window, config.dead_age),
            max_bytes=config.dead_bytes,
            max_age=config.dead_age,
            num_replicas=config.replicas,
            allow_direct=True,
        ),
    ]


async def ensure(js: JetStreamContext, config: BrokerConfig) -> None:
    """Make every stream and bucket of `config`; those that exist take its limits.

    Raises errors.Unavailable where the server has no room for a new one: each is promised its `max_bytes`.
    """
    for stream in streams(config):
        try:
            await js.add_stream(stream)
        except APIError as exc:
            if exc.err_code not in (_NAME_IN_USE, _NO_ROOM):
                raise
            await _bring_up_to_date(js, stream)
    for bucket in (subjects.KV_MODELS, subjects.KV_CATALOGUE, subjects.KV_PLACEMENT, subjects.KV_ROUTES):
        await js.create_key_value(bucket=bucket, history=1, replicas=config.replicas, direct=True)
    # In memory: a lease is worth nothing after a restart, and a slow or full disk must cost nobody the lead.
    memory = api.StorageType.MEMORY
    await js.create_key_value(
        bucket=subjects.KV_LEASES, history=1, replicas=config.replicas, storage=memory, direct=True
    )


async def _bring_up_to_date(js: JetStreamContext, stream: api.StreamConfig) -> None:
    try:
        made = (await js.stream_info(str(stream.name))).config
    except NotFoundError:
        raise errors.Unavailable(
            f"its storage has no room for the {stream.max_bytes or 0:,} bytes of stream {stream.name}: "
            "free some, or set lower limits in [broker]"
        ) from None
    # How a stream is written can't be changed later: it keeps what it was made with.
    try:
        await js.update_stream(dataclasses.replace(stream, persist_mode=made.persist_mode))
    except APIError as exc:
        if exc.err_code != _NO_ROOM:
            raise
        # Started anew on a disk that has filled up meanwhile. What is in the stream must run all the same.
        _log.warning("the broker's storage is short: stream %s keeps the limits it has", stream.name)


def consumer(base: str, service_class: str, config: BrokerConfig) -> api.ConsumerConfig:
    """The durable pull consumer that all workers of one (base, class) share."""
    name = subjects.consumer(base, service_class)
    return api.ConsumerConfig(
        durable_name=name,
        filter_subject=subjects.request_filter(base, service_class),
        ack_policy=api.AckPolicy.EXPLICIT,
        ack_wait=config.ack_wait,
        max_deliver=-1,
        # Credit bounds what is in flight; the server's default of 1,000 would bound the fleet.
        max_ack_pending=-1,
        max_waiting=4096,
    )
