"""`gradwatch run`: the parent of a watched command."""
