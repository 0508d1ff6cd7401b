"""What the collector tells Prometheus: the catalogue, the samples, and the text."""
