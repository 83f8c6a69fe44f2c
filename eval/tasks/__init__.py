"""The recall tasks: documents that ask for something said earlier, made from a seed, and how they are scored."""
