"""x"""


def register(app: object) -> None: ...
