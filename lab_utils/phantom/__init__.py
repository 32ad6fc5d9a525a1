"""A procedural cohort of T2-weighted brains, healthy and with gliomas, for those without data.

`fields` grids, random fields, flows; `atlas` what all brains share; `anatomy` one individual's
tissue; `head` its shape; `tumour` growth, mass effect, appearance; `scanner` contrast and
imperfections; `subject` one subject in memory; `cohort` many on disk.
"""

from lab_utils.phantom.cohort import make_cohort
from lab_utils.phantom.subject import PhantomSubject, make_subject

__all__ = ["PhantomSubject", "make_cohort", "make_subject"]
