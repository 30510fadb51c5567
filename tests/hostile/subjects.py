"""Every kind of file that the library reads."""

from __future__ import annotations

from tests.hostile import model_subjects
from tests.hostile.subject import Subject

SUBJECTS: tuple[Subject, ...] = (*model_subjects.SUBJECTS,)
