"""Write a pass for others: targets without images, with digests, a card and licenses.

    permafrost share store.path=stores/demo pass=resnet20 to=shared \\
        "licenses={images: CC-BY-4.0, weights: MIT, targets: CC-BY-4.0}"
    permafrost share store.path=stores/demo pass=resnet20 to=hf://me/demo-targets form=huggingface "licenses={...}"

`pass=` names the pass as store.teacher= does. Readers of WebDataset, Parquet and Hugging Face's data sets read the
files, and `permafrost attach` joins them to another store of the same images.

Reads   a pass of <store.path>, and the images with images=true or pixels=true
Writes  the new folder `to`, or with hf://<user>/<name> the folder <user>-<name> and a repository of the hub
Rerun   the folder is written again, and appears once it is whole
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("share")
