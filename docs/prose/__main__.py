"""Print every phrase, sentence and number of the pages that a reader stumbles over, and what to write instead.

python -m docs.prose       prints file:line and what to write; exit code 1 if there is something
"""

from __future__ import annotations

import sys
from itertools import chain

from docs.prose import intervals, phrases, readme_numbers, sentences, verdicts

if __name__ == "__main__":
    modules = (phrases, sentences, intervals, readme_numbers, verdicts)
    problems = list(chain.from_iterable(module.problems() for module in modules))
    print("\n".join(problems) or "The pages read well.")
    sys.exit(bool(problems))
