"""The KV hand-off: block geometry, tickets, the wire format, and the mover process that speaks UCX.

Who talks to whom on one host::

    engine process (connector)  --push/commit-->  mover  ==UCX==>  mover of the owner
            ^                                       |
            +------- done notices ---- service <----+   (LinkHub: a local ZeroMQ router in the service process)

Nothing here imports vLLM or torch: the mover must start fast and stay small.
"""
