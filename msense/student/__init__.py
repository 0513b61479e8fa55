"""Students: small encoders distilled from a teacher and its sense dictionary, as torch modules and as folders."""

from msense.student.config import StudentConfig, StudentSettings
from msense.student.files import load_student, save_student
from msense.student.making import make_student
from msense.student.shipping import ship
from msense.student.static_inference import StaticEncoder
from msense.student.student import Student, StudentOutput

__all__ = [
    "StaticEncoder",
    "Student",
    "StudentConfig",
    "StudentOutput",
    "StudentSettings",
    "load_student",
    "make_student",
    "save_student",
    "ship",
]
