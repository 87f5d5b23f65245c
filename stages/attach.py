"""Join a shared pass to a store of the same images, which may have been packed elsewhere.

    permafrost attach from=shared store.path=stores/mine

Records are found by the SHA-256 of their images: of the files, or with share's pixels=true of the decoded frames. Other
images are refused. The fields are those of the shared pass, bit for bit.

Reads   a folder that `permafrost share` has written, and the index of <store.path>
Writes  <store.path>/teachers/<name>-<fingerprint>/
Rerun   the same command computes only what is missing
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("attach")
