"""How Gradwatch lives inside the frameworks that start training processes."""
