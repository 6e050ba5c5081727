"""Self-powered data: instructions on transcripts, answered by the model's own LLM."""

from .blocks import BlockStore, write_atomically
from .filters import rejection_reason
from .generation import generate_targets
from .tasks import Task, assign_instruction, load_tasks, row_identity


__all__ = [
    "BlockStore",
    "Task",
    "assign_instruction",
    "generate_targets",
    "load_tasks",
    "rejection_reason",
    "row_identity",
    "write_atomically",
]
