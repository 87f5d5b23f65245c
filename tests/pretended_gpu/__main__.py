"""Print what paths ask of the pretended GPU, or write it as the table that the tests compare.

python -m tests.pretended_gpu [name ...]
python -m tests.pretended_gpu --write
"""

import sys

from tests.pretended_gpu import paths

if __name__ == "__main__":
    paths.main(sys.argv[1:])
