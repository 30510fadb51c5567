"""Every kind of file that the library reads."""

from __future__ import annotations

from tests.hostile import run_subjects
from tests.hostile.subject import Subject

SUBJECTS: tuple[Subject, ...] = (*run_subjects.SUBJECTS,)
