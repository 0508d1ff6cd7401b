"""`gradwatch demo`: a training run with one flipped bit in its data, and the verdict on it."""
