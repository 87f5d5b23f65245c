"""Tables of the pages, one module per paper. Read first: pages.py. `python -m docs.tables` fills them."""
