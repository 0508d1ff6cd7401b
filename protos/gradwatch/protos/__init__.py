"""The one schema of Gradwatch and the stubs made from it."""
