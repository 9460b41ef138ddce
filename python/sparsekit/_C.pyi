# The native module, csrc/python/module.cc. _native.py, its only caller, gives everything a type.
from typing import Any

def __getattr__(name: str) -> Any: ...
