"""Answers from a model: by transformers in one or several processes, or by vLLM.

Batches are made before the work is shared out, and with transformers each has a seed of its own: the same command
gives the same answers however many processes there are. With other batches sampled answers are others.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError

from examples.evaluation.options import EvaluationError, EvaluationOptions
from examples.evaluation.prompting import Prompts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One answer: its text, its length in tokens with the end token, and whether the length limit cut it."""

    text: str
    tokens: int
    cut: bool


@dataclass(frozen=True, kw_only=True)
class Request:
    """A batch for one call of generate: `rows` are (question, sample) pairs, `ids` their prompts."""

    seed: int
    rows: list[tuple[int, int]]
    ids: list[list[int]]


def choose_backend(options: EvaluationOptions) -> str:
    """`transformers` or `vllm`; raises `EvaluationError` where vLLM is asked for and cannot be had."""
    installed, size = find_spec("vllm") is not None, options.tensor_parallel_size
    if size > 1 and (options.backend == "transformers" or options.num_workers > 1 or not installed):
        raise EvaluationError(
            f"--tensor-parallel-size {size} is vLLM's ({'installed' if installed else 'not installed'}): leave it out, "
            "or --backend transformers and --num-workers, with which each GPU holds a copy of the model"
        )
    if 0 < (gpus := torch.cuda.device_count()) < size:
        raise EvaluationError(f"--tensor-parallel-size {size}: this node has {gpus} GPU(s)")
    if options.backend == "vllm" and not installed:
        raise EvaluationError("--backend vllm: vLLM is not installed; run `pip install vllm` or leave it out")
    if options.backend == "vllm" and options.num_workers > 1:
        raise EvaluationError(f"--num-workers {options.num_workers}: vLLM batches by itself; leave it out")
    if options.backend == "auto" and options.num_workers == 1 and installed and torch.cuda.is_available():
        return "vllm"
    return "vllm" if options.backend == "vllm" or size > 1 else "transformers"


def make_requests(prompts: Prompts, options: EvaluationOptions) -> list[Request]:
    """All samples of all questions in batches of like length, the longest first.

    The longest first shows a lack of memory at once and leaves short batches for the end.
    """
    rows = [(question, sample) for question in range(len(prompts.ids)) for sample in range(options.num_samples)]
    rows.sort(key=lambda row: -len(prompts.ids[row[0]]))
    batches = [rows[start : start + options.batch_size] for start in range(0, len(rows), options.batch_size)]
    return [
        Request(
            seed=options.seed * 1_000_003 + number,
            rows=batch,
            ids=[prompts.ids[question] for question, _ in batch],
        )
        for number, batch in enumerate(batches)
    ]


class TransformersGenerator:
    """A model on one device, ready to answer batches."""

    def __init__(self, options: EvaluationOptions, prompts_eos: list[int], pad: int, worker: int = 0) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
        from transformers.utils import logging

        device = "cpu"
        if torch.cuda.is_available():
            device = f"cuda:{worker % torch.cuda.device_count()}"
        self.eos, self.pad = prompts_eos, pad
        self.tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        dtype = DTYPES.get(options.dtype, "auto")
        # Its bars of loaded weights, one a process, would bury the few lines that matter.
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, trust_remote_code=False)
        except (OSError, ValueError, SafetensorError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EvaluationError(f"--model {options.model}: its weights cannot be loaded ({first})") from error
        self.model = model.to(device).eval()
        sampled = options.temperature > 0
        choice = {"temperature": options.temperature, "top_p": options.top_p, "top_k": max(0, options.top_k)}
        # Put in the place of the model's own, from which generate() would otherwise take what is left unsaid:
        # a repetition penalty, a temperature, top_k = 20.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=sampled,
            eos_token_id=self.eos,
            pad_token_id=pad,
            **(choice if sampled else {}),
        )

    def answer(self, request: Request) -> list[Generation]:
        """One generation for each row of the request, in its order."""
        longest = max(map(len, request.ids))
        # Padded on the left, so that every answer begins where its prompt ends.  # [batch, longest prompt]
        tokens = torch.tensor([[self.pad] * (longest - len(ids)) + ids for ids in request.ids])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in request.ids])
        torch.manual_seed(request.seed)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=tokens.to(self.model.device), attention_mask=mask.to(self.model.device)
            )
        return [self._finish(row) for row in output[:, longest:].tolist()]

    def _finish(self, ids: list[int]) -> Generation:
        """An answer without what comes after its end token."""
        end = next((place for place, token in enumerate(ids) if token in self.eos), None)
        kept = ids if end is None else ids[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Generation(text=text, tokens=len(ids) if end is None else end + 1, cut=end is None)


def generate(
    prompts: Prompts, options: EvaluationOptions, requests: Sequence[Request]
) -> Iterator[tuple[Request, list[Generation]]]:
    """Answer the requests with transformers; yields each with its answers, in the order of `requests`."""
    if options.num_workers == 1 or len(requests) == 1:
        generator = TransformersGenerator(options, prompts.eos, prompts.pad)
        for request in requests:
            yield request, generator.answer(request)
        return
    workers = min(options.num_workers, len(requests))
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    threads = max(1, (os.cpu_count() or 1) // workers)
    setup = (options, prompts.eos, prompts.pad, numbers, threads)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=setup) as pool:
        try:
            yield from zip(requests, pool.map(_answer, requests), strict=True)
        except BrokenProcessPool:
            raise EvaluationError(
                f"--num-workers {options.num_workers}: a process ended before its work was done (its own "
                "message stands above; without one, memory ran out: try fewer workers or smaller batches)"
            ) from None


# The model of a worker process, which answers many requests with it.
_generator: TransformersGenerator | None = None


def _start_worker(options: EvaluationOptions, eos: list[int], pad: int, numbers: Any, threads: int) -> None:
    """Load the model once in a worker process."""
    global _generator
    torch.set_num_threads(threads)
    _generator = TransformersGenerator(options, eos, pad, worker=numbers.get())


def _answer(request: Request) -> list[Generation]:
    """Answer one request in a worker process."""
    assert _generator is not None
    return _generator.answer(request)


def generate_vllm(
    prompts: Prompts, options: EvaluationOptions, requests: Sequence[Request]
) -> Iterator[tuple[Request, list[Generation]]]:
    """Answer the requests with vLLM, which makes its own batches; yields as `generate` does."""
    from vllm import LLM, SamplingParams

    dtype = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[options.dtype]
    model = LLM(
        model=options.model,
        dtype=dtype,
        seed=options.seed,
        tensor_parallel_size=options.tensor_parallel_size,
        generation_config="vllm",
        trust_remote_code=False,
    )
    flat = [(request, place) for request in requests for place in range(len(request.ids))]
    params = [
        SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            max_tokens=options.max_new_tokens,
            stop_token_ids=prompts.eos,
            # Of the question and the sample alone: it makes its own batches, and ours change nothing.
            seed=(options.seed * 1_000_003 + request.rows[place][0]) * 65_537 + request.rows[place][1],
        )
        for request, place in flat
    ]
    outputs = model.generate([{"prompt_token_ids": request.ids[place]} for request, place in flat], params)
    answers = [
        Generation(text=best.text, tokens=len(best.token_ids), cut=best.finish_reason == "length")
        for best in (output.outputs[0] for output in outputs)
    ]
    start = 0
    for request in requests:
        yield request, answers[start : start + len(request.rows)]
        start += len(request.rows)
