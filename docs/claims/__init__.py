"""The claims of the papers, one module per paper. Read first: sections.py."""
