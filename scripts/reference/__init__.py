"""References in the docs, made from the code: `python -m scripts.reference`."""
