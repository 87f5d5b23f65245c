"""Estimate the bytes and hours of a store before it is made, and when it pays, from a sample of its records.

    permafrost estimate experiment=demo
    permafrost estimate data=image_folder data.path=photos teacher=torchvision teacher.name=resnet50 \\
        teacher.weights=resnet50.pth teacher.input_size=224 estimate.records=1281167 estimate.workers=[1,8,64]
    permafrost estimate store.path=stores/demo teacher=none
    permafrost estimate data=image_folder data.path=photos store.path=stores/photos store.append=true teacher=...

It takes the options of precompute; with store.append=true it says what new records cost, and all of them anew. A few
shards are packed, annotated and trained on in a temporary folder. Each range in parentheses is the lowest and the
highest of what was measured.

Reads   the data, or only the store at <store.path> if it is finished, unless store.append=true, and the weights
Writes  runs/<run>/estimate.json; nothing to <store.path>
Rerun   the same command measures again, on the same records
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("estimate")
