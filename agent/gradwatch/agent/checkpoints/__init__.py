"""Checkpoints on disk: found, read without trust, looked at, set aside.

What the sidecar and the command line import (`find`, `listing`, `run`, `result`, `quarantine`) needs the
standard library only. torch is imported by `finite`, which runs in a child process of its own (`scan`).
Nothing here executes anything that a checkpoint says: see `unpickle`.
"""
