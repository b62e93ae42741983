"""How the built-in pair was trained: corpus, target, drafter, export. Not part of the package."""
