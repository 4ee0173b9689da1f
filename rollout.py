"""The sampler: G completions of every prompt, each token with the log-probability it was drawn at.

    token t of completion (i, j) ~ softmax(logits of (prompt i, tokens before t) / temperature)

`generate_slowly` is the specification: no cache, and one completion at a time. `Sampler` draws the
same tokens by continuous batching over a preallocated KV cache (engine/batching.py): a completion
that has finished makes room for the next, and a prompt goes through the model once for its group.

The random numbers of a row are its own (engine/sampling.py). Up to the rounding of logits, a
completion does not depend on the rows beside it, on the batch size or on the number of ranks.

What is recorded is what was drawn: token ids (text is never tokenized again) and, in float32, the
log-probability of each id under the very logits that it was drawn from. Training rollouts use
temperature only. top_k and top_p are for evaluation: with them mu is a truncated policy that no
trainer log-prob equals. Left out: beam search, several temperatures in one call, stop strings.
"""
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import dist
from engine.batching import (ContinuousBatch, Request, check_request, parameter_count,
                             room_for)
from engine.decode import InferenceModel
from engine.sampling import draw, row_uniforms
from progress import RolloutBar
from prompts import decode


@dataclass
class Rollout:
    """B = N x G completions, right-padded with 0.

    They are prompt-major: row i*G + j is sample j of prompt i."""
    tokens: torch.Tensor            # (B, T) int64, prompt then completion
    prompt_lengths: torch.Tensor    # (B,) int64
    lengths: torch.Tensor           # (B,) int64, of both together, stop token included
    logps: torch.Tensor             # (B, T) float32 log mu(token), 0 off the completion
    finished: torch.Tensor          # (B,) bool, a stop token was drawn; False: cut at its limit
    version: int = 0                # updates that the weights of mu had seen

    def completion_mask(self):
        """Returns (B, T) float32, 1 on completion tokens including the stop token.

        The mask comes from lengths, so that pad == eos is no problem."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]
        behind_prompt = position >= self.prompt_lengths[:, None]
        return (behind_prompt & (position < self.lengths[:, None])).float()

    def completions(self):
        """Returns B lists of token ids, the stop token included."""
        starts, ends = self.prompt_lengths.tolist(), self.lengths.tolist()
        return [row[start:end] for row, start, end in zip(self.tokens.tolist(), starts, ends)]


@torch.no_grad()
def generate_slowly(model, prompts, group_size, max_new_tokens, eos_ids, temperature=1.0, seed=0):
    """Does what Sampler.generate does, without a cache and one completion at a time.

    Returns a list of N x G pairs (token ids, their log-probs), prompt-major."""
    out = []
    for i, prompt in enumerate(prompts):
        # two numbers a token: the first chooses a part of the vocabulary, the second a token in it
        uniforms = row_uniforms([(seed, i)], group_size, max_new_tokens)        # (G, T, 2)
        for j in range(group_size):
            tokens, logps = [], []

            while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in eos_ids):
                text = torch.tensor([prompt + tokens], device=model.device)     # (1, length)
                logits = model(text)[:, -1]                                     # (1, V)
                u = uniforms[j, len(tokens)][None].to(model.device)             # (1, 2)
                token, logp = draw(logits, u, temperature)
                tokens.append(token.item())
                logps.append(logp.item())

            out.append((tokens, logps))
    return out


def draw_groups(sampler, tokenizer, problems, group_size, max_new_tokens, temperature, seeds,
                **options):
    """Draws group_size completions of each problem and decodes them.

    problems: N dicts with "prompt" (token ids); N may be 0, as on a rank that has nothing to draw.
    seeds: one for each. options: see Sampler.generate. Returns (Rollout, N lists of G texts)."""
    if not problems:
        return empty_rollout(sampler.model.device, sampler.version), []
    prompts = [problem["prompt"] for problem in problems]
    rollout = sampler.generate(prompts, group_size, max_new_tokens, temperature, seeds, **options)
    texts = decode(tokenizer, rollout.completions(), sampler.eos_ids.tolist())
    groups = [texts[start:start + group_size] for start in range(0, len(texts), group_size)]
    return rollout, groups


def empty_rollout(device, version=0):
    """Returns a Rollout of no completions: what a rank without prompts has."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Rollout(none[:, None], none, none, none[:, None].float(), none.bool(), version)


class Sampler:
    """Draws completions from a model.

    eos_ids: every id that ends a completion (generation_config may name several, the tokenizer one
    more). max_rows: completions in the cache at once, at most. kv_bytes: memory for keys and
    values; 0: most of what is free. graph: replay decode steps as device graphs; None: on CUDA.
    On Ascend graphs replace the chip's attention kernel."""

    def __init__(self, model, eos_ids, max_rows=1024, kv_bytes=0, graph=None):
        self.model = model
        self.max_rows = max_rows
        self.kv_bytes = kv_bytes
        self.version = 0
        self.graph = model.device.type == "cuda" if graph is None else graph
        if self.graph and model.device.type == "cpu":
            raise ValueError("device graphs need an accelerator: leave graph out on the CPU")
        self.eos_ids = torch.tensor(sorted(set(eos_ids)), dtype=torch.int64, device=model.device)
        self.weights = None         # an InferenceModel while `loaded`
        self.kept = None            # key/value memory of the last call, for the next one

    @contextmanager
    def loaded(self):
        """While open, all calls sample with the weights as they are now, which must not change.

        The sampler reads the weights themselves or copies, which are gone when it closes. With
        weights sharded over ranks every rank has to enter, also one that has nothing to draw."""
        dist.give_memory_back(self.model, cached=True)      # else large caches find only pieces
        self.weights = InferenceModel(self.model, self.max_rows)

        try:
            yield
        finally:
            self.weights = None
            dist.give_memory_back(self.model)

    def generate(self, prompts, group_size, max_new_tokens, temperature=1.0, seed=0, top_k=0,
                 top_p=1.0):
        """Returns a Rollout of group_size completions of each prompt (lists of token ids).

        temperature divides the logits; 0 is greedy. A completion ends at a stop id or after
        max_new_tokens, an integer, or one for each completion (list, tuple, array, CPU tensor).
        seed: a non-negative integer, or one seed a prompt (an integer or a tuple), which makes a
        prompt's completions the same in any batch. Raises ValueError for no prompts, an empty one,
        a token outside the vocabulary, no room in the context, keys and values of one row beyond
        the budget, or a model that gives no finite numbers."""
        if self.weights is None:
            with self.loaded():
                return self.generate(prompts, group_size, max_new_tokens, temperature, seed,
                                     top_k, top_p)

        most = max(np.ravel(max_new_tokens).tolist(), default=0)
        check_request(prompts, group_size, most, temperature, self.model.config)
        limits = per_row(max_new_tokens, len(prompts) * group_size)
        seeds = per_prompt(seed, prompts)

        with torch.inference_mode():
            uniforms = row_uniforms(seeds, group_size, most if temperature > 0 else 0)
            request = Request(prompts, group_size, limits, self.eos_ids,
                              uniforms.to(self.model.device), temperature, top_k, top_p)
            batch = self.batch_of(request)

            # refill (of slots, not --refill) lets finished completions go and waiting ones in; a
            # prompt goes through the model once, and its keys stay in the cache while one of its
            # completions runs. advance draws the next tokens of all that are running
            bar = RolloutBar(limits)
            checked = False
            while batch.refill():
                checked = checked or check_finite(batch.slots)      # once: it waits for the device
                bar.look(batch.schedule)
                batch.advance()
            bar.close()

        self.kept = batch.memory_to_keep()
        self.graph = batch.graph        # a device that refused once is not asked again
        check_finite(batch.slots)
        return padded_rollout(prompts, group_size, batch.slots.outcome(), self.version)

    def batch_of(self, request):
        """Returns the ContinuousBatch of a request; its cache takes the kept memory over."""
        room = room_for(request, self.model, self.max_rows, self.kv_bytes)
        kept, self.kept = self.kept, None       # memory that does not fit is given up right here
        return ContinuousBatch(self.weights, request, room, parameter_count(self.model),
                               self.graph, kept)


def check_finite(slots):
    """Returns True, or raises ValueError if a drawn token has no finite log-probability."""
    _, logps, _, _ = slots.outcome()
    if not logps.isfinite().all():
        raise ValueError("a drawn token has no finite log-probability: the model's weights or its "
                         "logits are NaN or infinite")
    return True


def padded_rollout(prompts, group_size, outcome, version):
    """Returns the Rollout of prompts and what was drawn after them (Slots.outcome).

    This runs outside inference mode, because the tensors will meet autograd."""
    ids, logps, drawn, finished = outcome       # (B, new tokens) twice, (B,) twice
    device = ids.device
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    prompt_lengths = prompt_lengths.repeat_interleave(group_size)       # (B,)
    lengths = drawn + prompt_lengths
    width = int(lengths.max())

    longest = max(len(prompt) for prompt in prompts)
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    tokens = torch.tensor(padded, device=device).repeat_interleave(group_size, 0)
    tokens = F.pad(tokens, (0, width - longest))                        # (B, T)

    # where each position stands in its row's completion, and whether there is a token
    index = torch.arange(width, device=device) - prompt_lengths[:, None]        # (B, T)
    in_completion = (index >= 0) & (index < drawn[:, None])
    index = index.clamp(0, ids.shape[1] - 1)
    tokens = torch.where(in_completion, ids.gather(1, index), tokens)
    logps = torch.where(in_completion, logps.gather(1, index), 0.0)
    return Rollout(tokens, prompt_lengths, lengths, logps, finished.clone(), version)


def per_row(max_new_tokens, rows):
    """Returns a list of `rows` limits, from one integer for all completions or one for each.

    Raises ValueError for another number of them, or one that is no positive integer."""
    limits = np.ravel(max_new_tokens).tolist()
    if np.ndim(max_new_tokens) == 0:
        limits = limits * rows
    if len(limits) != rows or not all(isinstance(n, int) and n > 0 for n in limits):
        raise ValueError("max_new_tokens must be one positive integer, or one for each of "
                         f"{rows} completions")
    return limits


def per_prompt(seed, prompts):
    """Returns a list of seeds, one a prompt, from one integer for all or a sequence of them.

    Raises ValueError for another number of them, or a negative one."""
    if isinstance(seed, (list, tuple)):
        seeds = list(seed)
    else:
        seeds = [(seed, i) for i in range(len(prompts))]
    if len(seeds) != len(prompts) or any((np.atleast_1d(s) < 0).any() for s in seeds):
        raise ValueError("seed must be one non-negative integer, or one seed for each of "
                         f"{len(prompts)} prompts")
    return seeds
