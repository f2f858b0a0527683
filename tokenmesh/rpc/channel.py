"""Client channels between services."""

from __future__ import annotations

import grpc

MAX_MESSAGE_BYTES = 16 << 20
"""Bound for one message; a prompt of a million tokens fits."""

_KEEPALIVE = [
    # A decode may be silent for long; pings keep proxies from dropping it and find dead peers within 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]

CHANNEL_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A restarted peer must be found again quickly.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

SERVER_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Two servers on one port would share it silently; we want the second to fail.
    ("grpc.so_reuseport", 0),
]


def aging(most_s: float, call_s: float) -> list[tuple[str, int]]:
    """Server options: a connection is closed after `most_s`, when its calls, of up to `call_s`, have ended.

    Clients connect anew without a word, so that servers that came later have their part of the work.
    """
    return [
        ("grpc.max_connection_age_ms", int(most_s * 1000)),
        ("grpc.max_connection_age_grace_ms", int(call_s * 1000)),
    ]


_LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def dial(host: str, port: int) -> str:
    """host:port as clients on this machine reach it: a wildcard that is listened on is no address to call."""
    return join(_LOOPBACK.get(host, host), port)


def join(host: str, port: int) -> str:
    """host:port, in brackets if the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port. Connects lazily and reconnects by itself; close it."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
