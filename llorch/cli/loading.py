"""Loading modules with the garbage collector at rest, as what a module makes while it loads stays.

Of a role's start a tenth went into looking for garbage among its modules. Imports nothing of llorch: it comes first.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Import inside. What there is afterwards is not looked at again; a megabyte of it is garbage, at a first load.

    Where all has been loaded before, nothing is kept so: then it could be anything that waits to be collected.
    """
    modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        gc.enable()
