"""Make a pass of targets that exist: logits, maps, features or embeddings that another tool has written.

    permafrost ingest format=npz path=targets.npz store.path=stores/photos format.frame=center_crop
    permafrost ingest format=fkd path=FKD_soft_label_500_crops store.path=stores/imagenet format.views=50
    permafrost ingest format=e2kd path=frozen/fit store.path=stores/imagenet format.frame=center_crop \\
        teacher=torchvision teacher.name=resnet34 teacher.weights=resnet34.pth

Every record gets the target of its name, and the pass is as those of precompute. With teacher=, the network that made
the targets is run on a sample of the same views, and what it says is compared with them before anything is stored.

Reads   the files of `path`, and the index of <store.path>; images only with teacher=
Writes  <store.path>/teachers/<name>-<fingerprint>/
Rerun   the same command computes only what is missing
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("ingest")
