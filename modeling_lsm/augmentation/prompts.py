"""The prompts that ask an LLM for targets: those of training, with the transcript in the place of the speech."""

from transformers import PreTrainedTokenizerBase

from ..processing_lsm import make_chat


class Prompter:
    """
    Turns instructions and transcripts into token ids, and token ids of answers into text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The LLM's tokenizer.
        chat_template (`str`): The template of the LSM's processor, or that of the LSM to be composed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str):
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    def encode(self, prompts: list[tuple[str, str]]) -> list[list[int]]:
        """Token ids of prompts, each an instruction and the transcript that it is about."""
        if not prompts:
            return []
        chats = [make_chat(instruction, transcript=transcript) for instruction, transcript in prompts]
        texts = self.tokenizer.apply_chat_template(
            chats, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
        )
        # As the processor does: a template that writes the first token itself is not given another.
        bos = self.tokenizer.bos_token
        return self.tokenizer(texts, add_special_tokens=bos is None or not texts[0].startswith(bos))["input_ids"]

    def decode(self, token_ids: list[int]) -> str:
        """The text of an answer."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


__all__ = ["Prompter"]
