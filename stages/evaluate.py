"""Evaluate a finished student, its teacher or a given network: accuracy, agreement with the teacher and localization.

    permafrost evaluate experiment=demo
    permafrost evaluate run=my-student evaluate.splits=[test]      (on the store that it was trained from)
    permafrost evaluate experiment=demo evaluators=[accuracy,localization,shift] evaluate.shift.pixels=4
    permafrost evaluate experiment=demo model=teacher
    permafrost evaluate experiment=demo model=teacher evaluators=[equivariance] augment=pad_crop_flip
    permafrost evaluate store.path=stores/demo run=pair model=network student=timm student.weights=pretrained
    permafrost evaluate store.path=stores/other-images run=transferred evaluate.store=stores/teachers-own
    permafrost evaluate store.path=stores/demo run=my-student evaluate.against=first-teacher

Reads   runs/<run>/distill/ and <store.path>, including its teacher passes; the teacher's network (teacher=,
        teacher.weights=) is needed only by some evaluators and with model=teacher. With model=network the network
        of student= and student.weights= takes the place of runs/<run>/distill/
Writes  runs/<run>/evaluate/: metrics.json, records.parquet, pictures.safetensors, config.yaml; the results
        of a teacher are in evaluate-teacher/, those of a given network in evaluate-network/, those against another
        pass in evaluate-against-<pass>/, those of further splits or frames in evaluate-on-<splits>[-<frame>]/, and
        those on another store than that of the training in evaluate-in-<store>/.
        Those of a student are also in the tracker's run of its training (logger=)
Rerun   each evaluator is a unit of work, and finished evaluators are skipped
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("evaluate")
