"""From a decision to a job that trains again. Pure; docs: decision 0007."""
