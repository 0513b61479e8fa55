"""msense: sense dictionaries from large teacher models, and small students that speak in them.

`import msense` is light: neither torch nor Ray is loaded until a name below is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msense.dictionary import SenseDictionary
    from msense.encoder import SenseEncoder

__version__ = "0.1.0"
__all__ = ["SenseDictionary", "SenseEncoder", "__version__"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the module-level hook of PEP 562 is untyped by nature
    """Import the dictionary and the encoder on first use (PEP 562), so that `import msense` stays light."""
    if name == "SenseDictionary":
        from msense.dictionary import SenseDictionary

        return SenseDictionary
    if name == "SenseEncoder":
        from msense.encoder import SenseEncoder

        return SenseEncoder
    raise AttributeError(f"module 'msense' has no attribute {name!r}")
