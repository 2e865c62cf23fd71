"""Engines: what each is started with, what all of them are asked and how their answers read.

Pure but for `detect` (looks at this machine) and the programs that run in processes of their own. `auto.ENGINES` is the
registry. Nothing is imported here, for those programs start through this package.
"""
