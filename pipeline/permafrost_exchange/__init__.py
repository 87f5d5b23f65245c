"""Targets of other tools that come in (ingest), and passes that go out without their images (share, attach).

Each format has a reader, which lists and reads its files; all else is the same for all of them.
Read first: target_reader.py and formats/fkd.py, then ingestion.py and share_writer.py.
"""
