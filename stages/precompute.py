"""Pack inputs into a store, and store the logits and explanations of a frozen teacher once.

    permafrost precompute experiment=demo teacher=none      (packs only)
    permafrost precompute experiment=demo
    permafrost precompute store.path=stores/demo teacher=cifar teacher.name=resnet20 \\
        teacher.weights=runs/my-teacher/teach/model.safetensors      (a pass on a finished store needs no data=)

Reads   the data, unless the store is finished and the options are the same or data=none, and the teacher's weights
Writes  <store.path>: image shards, index, manifest; facts.json, thumbnails/; teachers/<name>-<fingerprint>/
Rerun   the same command computes only what is missing
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("precompute")
