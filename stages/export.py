"""Export a student as programs that run without this project: torch.export and ONNX, with all preprocessing.

    permafrost export experiment=demo run=my-student
    permafrost export run=photos export.formats=[torch]

Each program takes the pixels of decoded images and returns logits, or with export.output=pooled the features before the
classifier. It is run once, and must give the network's output up to 1e-4 of the largest one. On some files of the store
it is then compared with what an evaluation shows the student. For phones and browsers, export.input_size=fixed takes
one frame of the network's size, and export.int8=true quantizes it.

Reads   runs/<run>/distill/ and evaluate/, and the size of the frames of <store.path>
Writes  student.onnx (needs the extra `onnx`) and student.pt2, or embedding.onnx and embedding.pt2, and a card README.md
        and predict.py, which runs student.onnx, in runs/<run>/distill/export/, which to=hf://<user>/<name> uploads; a
        timm student is there in timm's form, too; student.int8.onnx with export.int8=true
Rerun   the programs are written again
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("export")
