"""Training scripts that the tests run as ranks. They know nothing of Gradwatch."""
