"""This machine's memory, as pools see it: what a model needs of it, what is free, who else wants it.

Owns the questions that need the facts of GPUs and RAM: whether there is room for a start, or for a second model beside
the first; which pools stand back for a GPU's owner or for the hour; and what engines were measured to take. What the
answers are is decided by `fit` and `owner`. Never starts or stops anything.
"""

from __future__ import annotations

OWNER, HOURS = "owner", "hours"
