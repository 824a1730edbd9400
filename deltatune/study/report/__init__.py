"""Reports: what a study found, as a page and as Markdown with pictures. Data first, drawing apart."""
