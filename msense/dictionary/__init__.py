"""The sense dictionary and its on-disk format."""

from msense.dictionary.format import write_dictionary
from msense.dictionary.layout import Arrays, DictionaryConfig, DictionaryFiles, TeacherName
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
