"""Distill and evaluate many students from one store: every variant with every seed, several in parallel.

    permafrost sweep experiment=demo
    permafrost sweep experiment=demo seeds=[5,6,7] parallel=4 cluster.gpus_per_student=0.25
    permafrost sweep store.path=stores/demo run=taus executor=serial \\
        "variants={t1: ['method.tau=1'], t4: ['method.tau=4']}"
    permafrost sweep experiment=demo run=search subset.holdout=10 select=holdout.accuracy \\
        "grid={method.tau: [1, 4], method.lambda_map: [1, 5, 10]}"

A variant uses the options of `grid` that its method has. With `select`, all students are evaluated on that split, and
only those of each variant's best point (by the mean over seeds) on evaluate.splits.

Reads   <store.path>
Writes  runs/<run>/students/<variant>-seed<n>-<id>/ in the form of distill and evaluate (with select/<split>/ next to
        evaluate/), then runs/<run>/sweep.json
Rerun   a student's id is the hash of the options and inputs of its training, so finished students are not trained
        again; other splits, frames, passes or stores are evaluated next to the earlier ones
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("sweep")
