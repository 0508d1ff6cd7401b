"""`gradwatch demo`: a training run with something broken in it, and the verdict on it."""
