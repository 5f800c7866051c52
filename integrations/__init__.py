"""Adapters between SequenceParallel and the engines people train with, installed as ``seqpar_ring.integrations``.

Each module knows one engine, imports it, and holds a ``seqpar_ring.SequenceParallel``; the core knows none of them.
Importing this package imports no engine: ask for the module you need, ``seqpar_ring.integrations.deepspeed`` say.
"""
