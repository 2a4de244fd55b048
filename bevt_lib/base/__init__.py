"""Small things that every room may import: recipes, keyed seeds, processes, safe files."""
