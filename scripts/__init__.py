"""What the developers of Gradwatch run."""
