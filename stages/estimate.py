"""Estimate the bytes and hours of a store before it is made, and when it pays, from a sample of its records.

    permafrost estimate experiment=demo
    permafrost estimate data=image_folder data.path=photos teacher=torchvision teacher.name=resnet50 \\
        teacher.weights=resnet50.pth teacher.input_size=224 estimate.records=1281167 estimate.workers=[1,8,64]
    permafrost estimate store.path=stores/demo teacher=none

It takes the options of precompute. A few shards are packed, annotated and trained on in a temporary folder. Each
range in parentheses is the lowest and the highest of what was measured.

Reads   the data, or only the store at <store.path> if it is finished, and the teacher's weights
Writes  runs/<run>/estimate.json; nothing to <store.path>
Rerun   the same command measures again, on the same records
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("estimate")
