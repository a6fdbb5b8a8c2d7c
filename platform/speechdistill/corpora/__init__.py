"""Corpora: one file each. `rows(root, ...)` yields manifest rows: dictionaries of `clip.v1` columns that start from
`uri` and `kind`; what the file's header says (duration, rate, channels, size) the ingest job reads itself.
"""
