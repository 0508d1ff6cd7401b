"""The policy: what is read from the policy file, and what is decided by it. Pure.

`document.load_policy` reads a file's bytes, `dossier.observe` keeps what a job's past is needed
for, `engine.decide` takes `(state, dossier, policy, now)` and returns a decision or why there is
none. Nothing here does IO or reads a clock.
"""
