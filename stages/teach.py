"""Train a teacher on a store's labels.

    permafrost teach experiment=demo
    permafrost teach store.path=stores/demo run=my-teacher teacher=cifar teacher.name=resnet20 \\
        teaching.split=train teaching.trainer.epochs=30
    permafrost teach store.path=stores/demo run=folds teacher=cifar teaching.folds=5      (for teacher=folds)

Reads   <store.path> (packed, without a teacher pass)
Writes  runs/<run>/teach/: model.safetensors, model.json, checkpoint.pt, metrics.jsonl, metrics.json, config.yaml,
        tensorboard/; with teaching.folds the same in fold-0/ and so on; a teaching with a preparation also writes its
        result here, and as an artifact of the store
Rerun   the same command resumes from the last checkpoint, and does not change a finished run
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("teach")
