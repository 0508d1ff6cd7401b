"""In which phase a gradient went bad: what is known of the passes, and of the loss between them."""
