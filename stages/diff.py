"""Show what differs between two stores, two passes or two runs, and whether their results may be compared.

    permafrost diff stores/photos stores/photos-2026
    permafrost diff stores/photos/teachers/resnet20-1a2b3c4d stores/photos/teachers/resnet20-5e6f7a8b
    permafrost diff stores/photos/1a2b3c4d stores/photos/5e6f7a8b
    permafrost diff kd e2kd output=kd-e2kd.json

A pass is named by its folder, or by the store's folder and the pass's name or digits. A run is named as in `run=`.
Records are compared between two stores; passes and runs of different stores say that their stores differ.

Reads   manifests and indexes of stores, manifests of passes, options of runs
Writes  nothing; with `output=` the differences as JSON
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("diff")
