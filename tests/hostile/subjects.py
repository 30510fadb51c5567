"""Every kind of file that the library reads."""

from __future__ import annotations

from tests.hostile import data_subjects, model_subjects, run_subjects
from tests.hostile.subject import Subject

SUBJECTS: tuple[Subject, ...] = (*data_subjects.SUBJECTS, *model_subjects.SUBJECTS, *run_subjects.SUBJECTS)
