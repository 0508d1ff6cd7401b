"""What of torch is wrapped so that the probe is told of it."""
