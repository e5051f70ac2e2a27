"""Text by name: files, datasets, what ships with the package, what a teacher writes; packed to
rows of tokens.
"""
