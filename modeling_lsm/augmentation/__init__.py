"""Self-powered data: instructions on transcripts, answered by the model's own LLM."""

from ..data.corpora import Corpus
from .backends import make_backend
from .blocks import BlockStore
from .filters import rejection_reason
from .generation import Answer, generate_targets
from .job import JobSettings, run_job
from .provenance import check_provenance
from .report import write_report
from .tasks import INSTRUCTIONS_FILE, Task, assign_instructions, load_tasks, row_identity
from .text_model import TextModel


__all__ = [
    "INSTRUCTIONS_FILE",
    "Answer",
    "BlockStore",
    "Corpus",
    "JobSettings",
    "Task",
    "TextModel",
    "assign_instructions",
    "check_provenance",
    "generate_targets",
    "load_tasks",
    "make_backend",
    "rejection_reason",
    "row_identity",
    "run_job",
    "write_report",
]
