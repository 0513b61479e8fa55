"""msense: sense dictionaries from large teacher models, and small student encoders distilled from them.

`import msense` loads neither torch nor Ray; they are imported when one of the names below is first used.

Example:
    >>> from msense import SenseDictionary
    >>> dictionary = SenseDictionary.load("runs/demo")
    >>> print(dictionary.lookup("bank").explain())
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from msense.constants import VERSION

if TYPE_CHECKING:
    from msense.dictionary import SenseDictionary
    from msense.student.encoder import SenseEncoder

__version__ = VERSION
__all__ = ["SenseDictionary", "SenseEncoder", "__version__"]
_MODULES = {"SenseDictionary": "msense.dictionary", "SenseEncoder": "msense.student.encoder"}


def __getattr__(name: str) -> Any:
    """Import a public class on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'msense' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
