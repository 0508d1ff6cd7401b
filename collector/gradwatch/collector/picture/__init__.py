"""A job as a picture: how each rank went, step by step, with what happened marked on the same axis."""
