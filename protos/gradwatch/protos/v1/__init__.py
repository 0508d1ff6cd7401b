"""Version 1 of the schema: package `gradwatch.v1`."""
