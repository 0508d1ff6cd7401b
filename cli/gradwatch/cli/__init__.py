"""The `gradwatch` command: everything else, composed."""
