"""Show how data are understood before anything is packed: splits, classes, labels, files, and all findings.

    permafrost preview data=image_folder data.path=photos
    permafrost preview data=webdataset data.path=tars preview.all=true executor=ray
    permafrost preview data=image_table data.path=photos.csv data.label=species
    permafrost preview data=image_folder data.path=photos against=stores/photos      (before they are appended)

A finding has a name and a level. `precompute` makes the same preview before it packs, and stops at an error
unless data.accept=[name] says that the data are as you mean them.

Reads   the names of all records, and the headers of preview.files of them
Writes  nothing, except that images inside of Parquet files are copied to data.cache
Rerun   the same command shows the same
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("preview")
