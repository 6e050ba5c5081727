"""What `SFTTrainer` needs besides itself to train an LSM."""

from .parts import PARTS, set_trained_parts


__all__ = ["PARTS", "set_trained_parts"]
