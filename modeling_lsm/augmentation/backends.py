"""
Where the answers come from: this process's own LSM, vLLM in this process, or a server.

A backend is anything with a method `answer(prompts, on_answer)`: instructions and transcripts in, one [`Answer`] each
out, in the same order. All of them decode greedily and put the same chat, [`make_chat`], to the LLM.
"""

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from ..processing_lsm import make_chat
from .generation import Answer, generate_targets
from .prompts import Prompter
from .text_model import TextModel


logger = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds between two tries
TRANSIENT_STATUSES = (408, 409, 429)  # and all from 500: what may be different a moment later


def ignore(answer: Answer) -> None:
    """What `on_answer` does unless told otherwise."""


class TransformersBackend:
    """
    Answers with a model in this process.

    Args:
        model (`PreTrainedModel`): The LSM whose LLM answers, or a causal LM.
        prompter ([`Prompter`]): Writes its prompts.
        max_new_tokens (`int`): Longest answer.
        batch_tokens (`int`): Tokens to have room for, see [`greedy_decode`].
    """

    def __init__(self, model: PreTrainedModel, prompter: Prompter, max_new_tokens: int, batch_tokens: int):
        self.model = model
        self.prompter = prompter
        self.max_new_tokens = max_new_tokens
        self.batch_tokens = batch_tokens

    def answer(self, prompts: list[tuple[str, str]], on_answer: Callable[[Answer], None] = ignore) -> list[Answer]:
        """Answers `prompts`, instructions and transcripts; `on_answer` is called with each answer once it is there."""
        return generate_targets(self.model, self.prompter, prompts, self.max_new_tokens, self.batch_tokens, on_answer)


class VllmBackend:
    """
    Answers with vLLM in this process, which must be the only one on its GPU: for several GPUs, start several processes
    and give each its own in `CUDA_VISIBLE_DEVICES`.

    Args:
        text_model (`str`): Hub id or folder of the LLM that the LSM was composed of.
        prompter ([`Prompter`]): Writes the prompts, so they are those of training.
        max_new_tokens (`int`): Longest answer.
        engine_kwargs (*optional*): Settings of `vllm.LLM`, like `gpu_memory_utilization` or `tensor_parallel_size`.

    Raises:
        ImportError: If vLLM is not installed.
    """

    def __init__(self, text_model: str, prompter: Prompter, max_new_tokens: int, **engine_kwargs: Any):
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                "Answering with vLLM in this process needs vllm: pip install vllm. Where its pins exclude this "
                "package's, run `vllm serve` in an environment of its own and answer with that server."
            ) from error
        self.prompter = prompter
        self.engine = vllm.LLM(model=text_model, **engine_kwargs)
        # transformers applies the LLM's own penalty to greedy decoding as well. Both stop at the LLM's own end tokens.
        penalty = self.engine.get_default_sampling_params().repetition_penalty
        self.settings = vllm.SamplingParams(
            temperature=0, max_tokens=max_new_tokens, repetition_penalty=penalty, detokenize=False
        )

    def answer(self, prompts: list[tuple[str, str]], on_answer: Callable[[Answer], None] = ignore) -> list[Answer]:
        """Answers `prompts`, instructions and transcripts; `on_answer` is called with each answer at the end."""
        requests = [{"prompt_token_ids": token_ids} for token_ids in self.prompter.encode(prompts)]
        answers = []
        for request in self.engine.generate(requests, self.settings, use_tqdm=False):
            output = request.outputs[0]
            text = self.prompter.decode(output.token_ids)
            answers.append(Answer(text, output.finish_reason == "stop", len(output.token_ids)))
            on_answer(answers[-1])
        return answers


class OpenAIBackend:
    """
    Answers with any server that speaks OpenAI's API: `vllm serve`, `transformers serve`, llama.cpp, a hosted one.

    The server writes the prompt with its own chat template for the LLM, from the same chat. What may pass (a lost
    connection, a time-out, 408, 409, 429, 5xx, an answer that is not JSON) is tried again: a server may be restarted
    under a running job.

    Args:
        base_url (`str`): Where the API starts, like `"http://localhost:8000/v1"`.
        model (`str`): Id of the LLM, as the server lists it.
        max_new_tokens (`int`): Longest answer.
        concurrency (`int`, *optional*, defaults to 16): Requests under way at a time.
        api_key (`str`, *optional*): Defaults to the environment variable `OPENAI_API_KEY`, if there is one.
        timeout (`float`, *optional*, defaults to 600): Seconds that one request may take.
        patience (`float`, *optional*, defaults to 30): Minutes for which a failing request is tried again.

    Raises:
        ImportError: If the package openai is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        max_new_tokens: int,
        concurrency: int = 16,
        api_key: str | None = None,
        timeout: float = 600.0,
        patience: float = 30.0,
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError("Answering with a server needs the package openai: pip install openai.") from error
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"The server's URL is {base_url!r}; expected one like 'http://localhost:8000/v1'.")
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells of every request
        self.openai = openai
        self.base_url = base_url
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.concurrency = concurrency
        self.timeout = timeout
        self.patience = patience
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or "none"  # a server at home asks for none

    def answer(self, prompts: list[tuple[str, str]], on_answer: Callable[[Answer], None] = ignore) -> list[Answer]:
        """
        Answers `prompts`, instructions and transcripts; `on_answer` is called with each answer once it is there.

        Raises:
            ValueError: If the server does not serve the model, or refuses a request.
            ConnectionError: If a request still fails after `patience` minutes.
        """
        return asyncio.run(self._answer(prompts, on_answer))

    async def _answer(self, prompts: list[tuple[str, str]], on_answer: Callable[[Answer], None]) -> list[Answer]:
        slots = asyncio.Semaphore(self.concurrency)
        # The client would retry by itself, but for a number of times and not for a length of time.
        client = self.openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._api_key, timeout=self.timeout, max_retries=0
        )

        async def answer_one(instruction: str, transcript: str) -> Answer:
            content = "".join(item["text"] for item in make_chat(instruction, transcript=transcript)[0]["content"])
            request = {
                "model": self.model,
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": self.max_new_tokens,
            }
            async with slots:
                completion = await self._persist(client.post, "/chat/completions", body=request)
            answer = read_completion(completion)
            on_answer(answer)
            return answer

        async with client:
            # Asked every time: a server that was restarted may serve something else.
            models = await self._persist(client.get, "/models")
            served = [model["id"] for model in models.get("data") or []]
            if self.model not in served:
                raise ValueError(
                    f"{self.base_url} does not serve {self.model!r}, but {', '.join(map(repr, served)) or 'nothing'}. "
                    "Start the server with that model, or name one that it serves."
                )
            return await asyncio.gather(*(answer_one(*prompt) for prompt in prompts))

    async def _persist(self, send: Callable[..., Awaitable[Any]], path: str, **kwargs: Any) -> dict[str, Any]:
        """The JSON object at `path`, asked for until it comes, is refused, or `patience` has run out."""
        give_up_at, delay = None, FIRST_DELAY
        while True:
            wait = delay * random.uniform(0.5, 1)  # what failed together should not come back together
            try:
                response = await send(path, cast_to=object, **kwargs)
                if isinstance(response, dict):
                    return response
                problem = f"no JSON object but {response!r:.200}"
            except self.openai.APIStatusError as error:
                problem = f"status {error.status_code}: {error.message:.500}"
                if error.status_code not in TRANSIENT_STATUSES and error.status_code < 500:
                    raise ValueError(
                        f"{self.base_url} refused a request ({problem}). Check the URL, which mostly ends in /v1, the "
                        "API key, and whether prompt and answer fit the model's context."
                    ) from error
                wait = max(wait, retry_after(error.response.headers))
            except self.openai.APIConnectionError as error:  # time-outs too
                problem = f"{type(error).__name__}: {error.__cause__ or error}"
            except json.JSONDecodeError as error:
                problem = f"damaged JSON: {error}"

            if give_up_at is None:
                give_up_at = time.monotonic() + self.patience * 60
                logger.warning("%s (%s): trying again for %g minutes.", self.base_url, problem, self.patience)
            if time.monotonic() + wait > give_up_at:
                raise ConnectionError(
                    f"{self.base_url} did not answer a request in {self.patience:g} minutes of tries (the last: "
                    f"{problem}). Look after the server, then start this command again."
                )
            await asyncio.sleep(wait)
            delay = min(2 * delay, LONGEST_DELAY)


def read_completion(completion: dict[str, Any]) -> Answer:
    """The answer in a server's completion: empty where it has no choices or no content, as if it was withheld."""
    choice = (completion.get("choices") or [{}])[0]
    text = (choice.get("message") or {}).get("content") or ""
    num_tokens = (completion.get("usage") or {}).get("completion_tokens") or 0
    return Answer(text.strip(), choice.get("finish_reason") == "stop", num_tokens)


def retry_after(headers: Mapping[str, str]) -> float:
    """For how many seconds a server asks to be left alone: 0 where it does not say."""
    value = headers.get("retry-after", "")
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0


__all__ = ["OpenAIBackend", "TransformersBackend", "VllmBackend"]


def make_backend(text_model: TextModel, args: Any, state: PartialState) -> Any:
    """
    The backend that the arguments of `augment.py` ask for, on the device of this process.

    Raises:
        ValueError: If there is no such backend, or an argument that it needs is missing.
    """
    if args.backend == "transformers":
        model = text_model.load(args.dtype, state.device)
        return TransformersBackend(model, text_model.prompter, args.max_new_tokens, args.batch_tokens)
    if args.backend == "vllm":
        if state.num_processes > 1:
            raise ValueError(
                f"vLLM takes its GPU for itself, and all {state.num_processes} processes would take the first. Start "
                "one job for each GPU: CUDA_VISIBLE_DEVICES=0 python augment.py … --num_shards 4 --shard_index 0."
            )
        if text_model.is_lsm:
            raise ValueError(
                f"vLLM cannot load the LSM {text_model.name}. Give --model_name_or_path the LLM that it was composed "
                "from."
            )
        return VllmBackend(text_model.name, text_model.prompter, args.max_new_tokens, dtype=args.dtype)
    if args.backend == "openai":
        if args.base_url is None or args.served_model is None:
            raise ValueError("--backend openai needs --base_url, the server, and --served_model, the LLM's id there.")
        return OpenAIBackend(args.base_url, args.served_model, args.max_new_tokens, args.concurrency)
    raise ValueError(f"--backend is {args.backend!r}; expected 'transformers', 'vllm' or 'openai'.")
