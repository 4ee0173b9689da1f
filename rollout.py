"""The sampler: G completions of every prompt from a hand-written decode loop over a preallocated KV cache.

Each prompt is prefilled once; its keys and values then serve its G rows. Every step draws one token a row, writes one
slot a row and drops rows that have stopped. A token is drawn by inverting the cumulative distribution at one uniform
number, and row (prompt i, sample j) owns its stream of uniforms, seeded by (seed, i, j): a completion does not depend
on which other rows share its batch, on the batch size or on the number of ranks.

What is recorded is what was drawn: token ids (text is never tokenized again) and, in float32, the log-probability of
each id under the very logits that it was drawn from. Training rollouts use temperature only. top_k and top_p are for
evaluation: with them mu is a truncated policy that no trainer log-prob equals.
"""
from dataclasses import dataclass

import numpy as np
import torch

from model import KVCache

LEAVE_AT = 0.8      # stopped rows leave when at most this share is alive: leaving copies the cache, staying costs compute


@dataclass
class Rollout:
    """B = N x G completions, prompt-major: row i*G + j is sample j of prompt i. Right-padded with 0."""
    tokens: torch.Tensor            # (B, T) int64, prompt then completion
    prompt_lengths: torch.Tensor    # (B,) int64
    lengths: torch.Tensor           # (B,) int64, prompt and completion together, stop token included
    logps: torch.Tensor             # (B, T) float32 log mu(token), 0 off the completion
    finished: torch.Tensor          # (B,) bool, a stop token was drawn; False: cut at max_new_tokens
    version: int = 0                # Sampler.version: optimizer steps that the weights of mu had seen

    def completion_mask(self):
        """(B, T) float32, 1 on completion tokens including the stop token. From lengths, so pad == eos is no problem."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]
        return ((position >= self.prompt_lengths[:, None]) & (position < self.lengths[:, None])).float()

    def completions(self):
        """B lists of token ids, the stop token included."""
        rows = zip(self.tokens.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist())
        return [tokens[start:end] for tokens, start, end in rows]


def empty_rollout(device):
    """No completions: what a rank without prompts has."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Rollout(none[:, None], none, none, none[:, None].float(), none.bool())


class Sampler:
    """Draws completions from a model.

    eos_ids: every id that ends a completion (generation_config may name several, the tokenizer one more).
    max_rows: completions held in the cache at once (one group at least); more prompts than fit are served in turn."""

    def __init__(self, model, eos_ids, max_rows=256):
        self.model, self.max_rows, self.version = model, max_rows, 0
        self.eos_ids = torch.tensor(sorted(set(eos_ids)), dtype=torch.int64, device=model.device)

    @torch.no_grad()
    def generate(self, prompts, group_size, max_new_tokens, temperature=1.0, seed=0, top_k=0, top_p=1.0):
        """group_size completions of each prompt (lists of token ids) -> Rollout.

        temperature divides the logits; 0 is greedy. seed: a non-negative integer, or one seed a prompt (an integer or
        a tuple), which makes a prompt's completions the same in any batch. Ends at a stop id or after max_new_tokens.
        ValueError for no prompts, an empty one, a token outside the vocabulary, or no room in the context."""
        check_request(prompts, group_size, max_new_tokens, temperature, self.model.config)
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [(seed, i) for i in range(len(prompts))]
        if len(seeds) != len(prompts) or min(n for s in seeds for n in np.atleast_1d(s)) < 0:
            raise ValueError(f"seed must be one non-negative integer, or one seed for each of {len(prompts)} prompts")
        step = max(1, self.max_rows // group_size)
        parts = [self._generate(prompts[i:i + step], group_size, max_new_tokens, temperature, seeds[i:i + step],
                                top_k, top_p) for i in range(0, len(prompts), step)]
        return concatenate(parts)

    def _generate(self, prompts, G, max_new_tokens, temperature, seeds, top_k, top_p):
        model, device = self.model, self.model.device
        lengths = [len(p) for p in prompts for _ in range(G)]
        B, P, T = len(lengths), max(lengths), max(lengths) + max_new_tokens
        prompt_lengths = torch.tensor(lengths, device=device)
        tokens = torch.zeros(B, T, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            tokens[i * G:(i + 1) * G, :len(prompt)] = torch.tensor(prompt)
        tokens, logps = tokens.to(device), torch.zeros(B, T, device=device)
        ends, finished = prompt_lengths.clone(), torch.zeros(B, dtype=torch.bool, device=device)
        uniforms = row_uniforms(seeds, G, max_new_tokens if temperature > 0 else 0).to(device)

        logits, cache = self._prefill(tokens[::G, :P], prompt_lengths[::G], G, T)
        rows = torch.arange(B, device=device)           # rows[k]: which completion cache row k holds
        alive = torch.ones_like(rows, dtype=torch.bool)
        for t in range(max_new_tokens):
            u = uniforms[rows, t] if temperature > 0 else None
            drawn, logp = draw(logits, u, temperature, top_k, top_p)
            slots = ends[rows]
            live = rows[alive]
            tokens[live, slots[alive]], logps[live, slots[alive]] = drawn[alive], logp[alive]
            ends[live] += 1
            stopped = alive & torch.isin(drawn, self.eos_ids)
            finished[rows[stopped]] = True
            alive = alive & ~stopped
            if t + 1 == max_new_tokens or not alive.any():
                break
            if alive.sum() <= LEAVE_AT * len(rows):
                keep = alive.nonzero()[:, 0]
                rows, alive, drawn, slots = rows[keep], alive[keep], drawn[keep], slots[keep]
                cache.select(keep)
            logits = model.decode(drawn, slots, int(slots.max()) + 1, cache)
        T = int(ends.max())
        return Rollout(tokens[:, :T], prompt_lengths, ends, logps[:, :T], finished, self.version)

    def _prefill(self, prompts, lengths, G, slots):
        """prompts (N, P) once through the model; logits (N*G, V) and a cache of N*G rows that hold their keys."""
        model, (N, P) = self.model, prompts.shape
        prompt_cache = KVCache(model.config, N, P, model.device, model.dtype)
        logits = model.prefill(prompts, lengths, prompt_cache)
        cache = KVCache(model.config, N * G, slots, model.device, model.dtype)
        cache.k[:, :, :, :P] = prompt_cache.k.repeat_interleave(G, 1)
        cache.v[:, :, :, :P] = prompt_cache.v.repeat_interleave(G, 1)
        return logits.repeat_interleave(G, 0), cache


def check_request(prompts, group_size, max_new_tokens, temperature, config):
    """One ValueError line for a request that cannot be served."""
    if not prompts:
        raise ValueError("generate needs at least one prompt")
    if group_size < 1 or max_new_tokens < 1 or temperature < 0:
        raise ValueError(f"group_size {group_size} and max_new_tokens {max_new_tokens} must be at least 1, "
                         f"temperature {temperature} at least 0")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: give at least one token (bos, or the template's first)")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {i} has a token outside the vocabulary of {config.vocab_size}")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens: with {max_new_tokens} new ones it leaves the "
                             f"context of {config.max_position_embeddings}; lower --max-new-tokens")


def row_uniforms(seeds, G, count):
    """(N*G, count) float32 uniforms in [0, 1): row (i, j) depends on seeds[i] and j alone."""
    rows = []
    for seed in seeds:
        numbers = np.atleast_1d(seed).tolist()
        for j in range(G):      # the count first: numpy takes (1, 2) and (1, 2, 0) for the same seed
            generator = np.random.default_rng([len(numbers), *numbers, j])
            rows.append(generator.random(count, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))


def draw(logits, u, temperature, top_k=0, top_p=1.0):
    """One token a row: logits (B, V), u (B,) uniforms -> ids (B,) int64 and their log-probabilities (B,) float32.

    Temperature 0 takes the largest logit and reports its log-probability at temperature 1."""
    logits = logits.float() / (temperature or 1.0)
    if top_k > 0 or top_p < 1:
        logits = truncate(logits, top_k, top_p)
    log_probs = logits.log_softmax(-1)
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        cdf = log_probs.exp().cumsum(-1)
        if cdf.device.type != "cpu":
            cdf = cdf.cummax(-1).values         # a parallel sum need not be monotone in the last bit
        total = cdf[:, -1:]
        # the first id whose cdf exceeds u; "cdf < total" so that rounding can never step past the last possible id
        ids = ((cdf <= u[:, None] * total) & (cdf < total)).sum(-1)
    return ids, log_probs.gather(-1, ids[:, None])[:, 0]


def truncate(logits, top_k, top_p):
    """-inf for what nucleus (arXiv 1904.09751) and top-k sampling exclude; at least one id stays. Evaluation only."""
    ordered, order = logits.sort(-1, descending=True)
    if top_k > 0:
        ordered[:, top_k:] = float("-inf")          # first: top_p is a share of what top_k leaves
    probs = ordered.softmax(-1)
    out = (probs.cumsum(-1) - probs >= top_p) | ordered.isinf()
    out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), float("-inf"))


def concatenate(parts):
    """Rollouts one after the other as one Rollout, padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    T = max(p.tokens.shape[1] for p in parts)
    wide = {name: torch.cat([torch.nn.functional.pad(getattr(p, name), (0, T - p.tokens.shape[1])) for p in parts])
            for name in ("tokens", "logps")}
    flat = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("prompt_lengths", "lengths", "finished")}
    return Rollout(**wide, **flat, version=parts[0].version)
