"""The files of a run and how to read them back; skip this folder on a first reading."""
