"""The sense dictionary and its on-disk format."""

from msense.dictionary.format import Arrays, DictionaryConfig, DictionaryFiles, TeacherName, write_dictionary
from msense.dictionary.sense_dictionary import SenseDictionary, Senses

__all__ = [
    "Arrays",
    "DictionaryConfig",
    "DictionaryFiles",
    "SenseDictionary",
    "Senses",
    "TeacherName",
    "write_dictionary",
]
