"""Snapshots of a shard's embedded stores, so that a new replica need not read the whole log.

    settings    which target, and how often
    targets     where snapshots are: the Object Store, a folder, S3, GCS
    manifest    what a snapshot is: a list of pieces with their checksums
    taking      file → copy of one moment → pieces → read back → manifest
    starting    newest good manifest → pieces → files → open
    keeper      a shard's snapshots: when one is due, who takes it, which are kept

A snapshot exists once its manifest does, which is written when all of its pieces have been read back. Names are
`<site>/<shard>/manifests/<id>` and `<site>/<shard>/pieces/<id>/<file>/<number>`.
"""
