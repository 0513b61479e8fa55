"""Students: small encoders distilled from a teacher and its sense dictionary, as torch modules and as folders."""

from msense.student.config import StudentConfig, StudentSettings
from msense.student.files import load_student, save_student
from msense.student.making import init_student
from msense.student.shipping import save_pretrained
from msense.student.static_inference import StaticEncoder
from msense.student.student import Student, StudentOutput

__all__ = [
    "StaticEncoder",
    "Student",
    "StudentConfig",
    "StudentOutput",
    "StudentSettings",
    "init_student",
    "load_student",
    "save_pretrained",
    "save_student",
]
