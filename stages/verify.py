"""Check every byte, count, key and value of a store against its manifests.

    permafrost verify experiment=demo
    permafrost verify store.path=stores/demo
    permafrost verify store.path=stores/photos store.teacher=[fkd] teacher=torchvision teacher.name=resnet50 \\
        teacher.weights=resnet50.pth

With teacher=, the network that is said to have made a pass is run on a sample of its views, and compared with it.

Reads   all of <store.path>
Writes  nothing; prints a line for each problem, with exit code 1 if there is any. With teacher=, the agreement is
        written into the pass's manifest
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("verify")
