"""Train one student from a store, without running a teacher unless mode=live.

    permafrost distill experiment=demo
    permafrost distill store.path=stores/demo run=my-student student=cifar student.name=resnet8 \\
        method=e2kd method.tau=4 method.lambda_map=3
    permafrost distill experiment=demo run=two-ranks trainer.ranks=2
    permafrost distill experiment=demo run=reference mode=live

Reads   <store.path> and one teacher pass in it (named by `store.teacher=` if there are several), or the teacher's
        weights with mode=live
Writes  runs/<run>/distill/: model.safetensors, model.json, checkpoint.pt, metrics.jsonl, tensorboard/, config.yaml
        (logger= takes the place of tensorboard/)
Rerun   the same command resumes from the last checkpoint, with any trainer.ranks, and does not change a finished run
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("distill")
