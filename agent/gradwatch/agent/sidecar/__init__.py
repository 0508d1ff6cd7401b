"""The sidecar: ships the journals of one node to the collector."""
