"""Finding a shape: from a budget to what is cut, by measuring what is cut and what ships."""
