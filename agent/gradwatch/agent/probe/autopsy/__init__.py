"""The autopsy: a bad micro-batch is replayed, and the operator named in which it went bad."""

# The part of the probe, for its fuse.
PART = "autopsy"
