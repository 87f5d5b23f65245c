"""Summarize a store, and a sweep or a student on it if there is one, in one self-contained HTML page.

    permafrost report experiment=demo
    permafrost report run=photos augment=resized_crop_flip
    permafrost report store.path=stores/demo run=taus report.baseline=t1 report.candidate=t4

Reads   <store.path>; runs/<run>/sweep.json and the runs it lists, or runs/<run>/distill and evaluate of one student;
        runs/<run>/evaluate-teacher and evaluate-network;
        for the cases, the weights and records.parquet of two students
Writes  runs/<run>/report.html, report.json with its numbers, report.csv with one row per student and split, and
        report.variants.csv with one per variant, split and metric; report.tex with format=latex; a report on another
        store than that of the training is report-in-<store>.html
Rerun   the same command writes the same files while options, store and runs are the same
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("report")
