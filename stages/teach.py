"""Train a teacher on a store's labels.

    permafrost teach experiment=demo
    permafrost teach store.path=stores/demo run=my-teacher teacher=cifar teacher.name=resnet20 \\
        teaching.split=train teaching.trainer.epochs=30

Reads   <store.path> (packed, without a teacher pass)
Writes  runs/<run>/teach/: model.safetensors, model.json, checkpoint.pt, metrics.jsonl, metrics.json, config.yaml,
        tensorboard/; a teaching with a preparation also writes its result here, and as an artifact of the store
Rerun   the same command resumes from the last checkpoint, and does not change a finished run
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("teach")
