"""One self-contained page from finished runs: tables, curves, pictures, and what it all cost."""
