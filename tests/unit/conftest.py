"""What the unit tests share: how long a property is searched. The whole folder is to take less than five seconds."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unit", max_examples=40, deadline=None)
settings.load_profile("unit")
