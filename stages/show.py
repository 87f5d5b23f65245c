"""Show a store and a pass in one picture: facts, records next to their maps, and two histograms.

    permafrost show store.path=stores/demo
    permafrost show store.path=stores/demo store.teacher=[resnet8] show.split=test_swapped \\
        show.output=demo.png

Reads   <store.path>, and one teacher pass in it if there is one (named by `store.teacher=` if there are several)
Writes  the picture to `show.output=`, as PNG, SVG or PDF by its name
Rerun   the same command writes the same picture
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("show")
