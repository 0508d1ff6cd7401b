"""Looks at weights, and at what an optimizer is given."""
