"""The store's schema, step by step; applied whenever a store is opened."""
