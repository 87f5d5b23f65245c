"""Fill the tables of all pages.

python -m docs.tables       rewrites what is between `<!-- table: NAME -->` and `<!-- end -->` in README.md and docs/
"""

from __future__ import annotations

from docs.tables.pages import pages, with_tables

if __name__ == "__main__":
    for page in pages():
        page.write_text(with_tables(page.read_text()))
