"""The sampler: G completions of every prompt by continuous batching over a preallocated KV cache.

    queue of completions -> slots of the cache -> a step draws one token a slot -> finished ones leave, the next come in

A prompt goes through the model once; its keys and values then serve its whole group (decode.py). The slots are as many as
`max_rows` and a budget in bytes allow, so the memory of keys and values is known before the first token. A slot whose
completion has finished is given to the next of the queue, so a long tail never holds the batch (iteration-level batching,
Orca, OSDI 2022); without a next one the slots that are left move together. On accelerators the host looks for finished
rows every few steps only, and a step may be a device graph. Left out: pages of keys, so a slot reserves max_new_tokens.

A row's random numbers are its own (sampling.py): a completion does not depend on which other rows share its batch, on the batch
size or on the number of ranks.

What is recorded is what was drawn: token ids (text is never tokenized again) and, in float32, the log-probability of
each id under the very logits that it was drawn from. Training rollouts use temperature only. top_k and top_p are for
evaluation: with them mu is a truncated policy that no trainer log-prob equals.
"""
import math
import sys
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from engine.decode import ONE_BLOCK, Cache, Groups, InferenceModel, bytes_per_token, capture, own_blocks, prompt_slots
from engine.machine import free_bytes, give_memory_back
from engine.sampling import draw, row_uniforms

LEAVE_AT = 0.9      # stopped rows leave when at most this share is alive: leaving copies keys, staying costs compute
LOOK_EVERY = 8      # steps between two looks at which rows have stopped, on accelerators (a look waits for the device)
KV_SHARE = 0.8      # of the free memory that keys and values may take
KEEP_BYTES = 2 ** 30        # of own keys and values whose memory is kept from rollout to rollout, at most
FEW_ROWS = 6        # of a step on the CPU, at least: products with fewer take oneDNN longer than with six
LEAST_ROWS, LEAST_SLOTS = 8, 128        # of a step elsewhere, at least: fewer shapes, and so fewer graphs to capture
LITTLE_WORK = 5 * 10 ** 7       # FLOP a step on the CPU: less is not worth a second thread, nor leaving before LEAVE_AT


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


def empty_rollout(device, version=0):
    """No completions: what a rank without prompts has."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Rollout(none[:, None], none, none, none[:, None].float(), none.bool(), version)


def completions(sampler, tokenizer, problems, group_size, max_new_tokens, temperature, seeds, **options):
    """Draw and decode."""
    if not problems:
        return empty_rollout(sampler.model.device, sampler.version), []
    rollout = sampler.generate([p["prompt"] for p in problems], group_size, max_new_tokens, temperature,
                               seed=seeds, **options)
    texts = tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
    return rollout, [texts[k:k + group_size] for k in range(0, len(texts), group_size)]


class Sampler:
    """Draws completions from a model.

    eos_ids: every id that ends a completion (generation_config may name several, the tokenizer one more).
    max_rows: completions in the cache at once, at most. kv_bytes: memory for keys and values; 0: most of what is free.
    graph: replay decode steps as device graphs; None: on CUDA. With Ascend's graphs its attention kernel is not used."""

    def __init__(self, model, eos_ids, max_rows=1024, kv_bytes=0, graph=None):
        self.model, self.max_rows, self.kv_bytes, self.version = model, max_rows, kv_bytes, 0
        self.graph = model.device.type == "cuda" if graph is None else graph
        if self.graph and model.device.type == "cpu":
            raise ValueError("device graphs need an accelerator: leave graph out on the CPU")
        self.eos_ids = torch.tensor(sorted(set(eos_ids)), dtype=torch.int64, device=model.device)
        self.weights = self.kept = None         # kept: see keep

    @contextmanager
    def loaded(self):
        """While open, all calls sample with the weights as they are now, which must not change meanwhile: some are copied, some
        are not. With weights sharded over ranks every rank has to enter, also one that has nothing to draw; the copy is gone
        when it closes."""
        if self.model.device.type != "cpu":         # what training has freed, or large caches find only pieces of it
            getattr(torch, self.model.device.type).empty_cache()
        self.weights = InferenceModel(self.model, self.max_rows)
        try:
            yield
        finally:
            self.weights = None
            if self.model.device.type == "cpu" and parameters(self.model) > 10 ** 8:
                give_memory_back()

    def generate(self, prompts, group_size, max_new_tokens, temperature=1.0, seed=0, top_k=0, top_p=1.0):
        """group_size completions of each prompt (lists of token ids) -> Rollout.

        temperature divides the logits; 0 is greedy. seed: a non-negative integer, or one seed a prompt (an integer or
        a tuple), which makes a prompt's completions the same in any batch. Ends at a stop id or after max_new_tokens: an
        integer, or one for each completion (list, tuple, array, CPU tensor). ValueError for no prompts, an empty one, a token
        outside the vocabulary, no room in the context, or keys and values of one row beyond the budget."""
        if self.weights is None:
            with self.loaded():
                return self.generate(prompts, group_size, max_new_tokens, temperature, seed, top_k, top_p)
        limits = np.ravel(max_new_tokens).tolist() * (1 if np.ndim(max_new_tokens) else len(prompts) * group_size)
        check_request(prompts, group_size, max(limits, default=0), temperature, self.model.config)
        if len(limits) != len(prompts) * group_size or not all(isinstance(n, int) and n > 0 for n in limits):
            raise ValueError(f"max_new_tokens must be one positive integer, or one for each of {len(prompts) * group_size} "
                             "completions")
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [(seed, i) for i in range(len(prompts))]
        if len(seeds) != len(prompts) or min(n for s in seeds for n in np.atleast_1d(s)) < 0:
            raise ValueError(f"seed must be one non-negative integer, or one seed for each of {len(prompts)} prompts")
        threads = torch.get_num_threads()
        try:
            with torch.inference_mode():
                uniforms = row_uniforms(seeds, group_size, max(limits) if temperature > 0 else 0).to(self.model.device)
                batch = InFlight(self, prompts, group_size, limits, uniforms, (temperature, top_k, top_p))
                while batch.refill():
                    if batch.is_little(batch.step_rows()):
                        torch.set_num_threads(1)
                    batch.advance()
                    torch.set_num_threads(threads)
        finally:
            torch.set_num_threads(threads)
        self.keep(batch)
        self.graph = batch.graph        # a device that refused once is not asked again
        return batch.rollout(self.version)

    def keep(self, batch):
        """The memory of the own keys for the next rollout, on the CPU if it is little: new pages of the system may cost a tenth
        of a rollout. Not if a broken model has written there: a mask hides any number, but not NaN."""
        k, v = batch.cache.memory
        if k.device.type == "cpu" and 2 * k.nbytes <= min(KEEP_BYTES, free_bytes(k.device) // 8):
            reached = -(-min(batch.time, batch.T) // k.shape[4])
            if all(x[:, :reached].sum().isfinite() for x in (k, v)):
                self.kept = k, v

    def room(self, lengths, group_size, new_tokens):
        """(rows, prompts) that the cache can hold, and the bytes that are left: max_rows and the memory budget, which has to hold
        one row at least."""
        model, N, budget, logits = self.model, len(lengths), self.kv_bytes, 0
        of_token = bytes_per_token(model.config, model.dtype)
        prompt = prompt_slots(max(lengths), model.device) * of_token
        if not budget:      # what is free, and room for each row's logits in float32, a few times over
            logits, budget = 16 * model.config.vocab_size, int(KV_SHARE * free_bytes(model.device))
        rows = min(max(1, self.max_rows), N * group_size)

        def own(n): return n * (math.prod(own_blocks(new_tokens, model.device, n)) * of_token + logits)
        while rows > 1 and own(rows) + min(N, 2 * -(-rows // group_size)) * prompt > budget:
            rows -= 1
        if own(1) + prompt > budget:
            raise ValueError(f"keys and values of one completion take {(own(1) + prompt) / 2 ** 20:.0f} MB, the budget is "
                             f"{budget / 2 ** 20:.0f} MB: lower --max-new-tokens, or raise --kv-memory-mb, or free memory")
        # a prompt stays for its last straggler: as many as there is room for, so that none keeps a free slot waiting
        places = min(N, rows, (budget - own(rows)) // prompt)
        return rows, places, budget - own(rows) - places * prompt


class InFlight:
    """The completions of one call. Slot k of the cache draws completion holder[k]; None: its last one has finished.

    Device tensors (slots,): token, the last one drawn; drawn, how many so far; limit; alive; row, where its tokens are
    written down (B, one row too many, when it is not alive). The host counts steps in `time` and knows `started`, the step at
    which a slot was filled (`oldest`: the first of them), and so how much a slot has drawn if it is alive; which have stopped
    it learns in refill only. place_of and logits_of: of a prompt, its place in the cache, and what the first tokens of its
    completions are drawn from. changed: slots were filled since `arrange`. in_step: all slots have drawn equally many."""

    def __init__(self, sampler, prompts, G, limits, uniforms, sampling):
        model = sampler.model
        self.device, self.eos_ids, self.graph, self.sampling = model.device, sampler.eos_ids, sampler.graph, sampling
        self.prompts, self.G, self.limits, self.B, self.T = prompts, G, limits, len(limits), max(limits)
        self.uniforms, self.look_every = uniforms, 1 if self.device.type == "cpu" else LOOK_EVERY
        self.ascend = (self.device.type == "npu" and not self.graph and model.dtype != torch.float32
                       and model.config.head_dim % 16 == 0)         # its kernel's limits
        self.static = self.device.type != "cpu"         # the same shapes step after step
        lengths = [len(p) for p in prompts]
        self.model, self.parameters = sampler.weights, parameters(model)
        self.slots, self.places, self.spare_bytes = sampler.room(lengths, G, self.T)
        kept, sampler.kept = sampler.kept, None
        self.cache = Cache(model.config, self.places, max(lengths), self.slots, self.T, self.device, model.dtype, kept)

        # long prompts first, so that prompts in the cache together have like lengths
        order = sorted(range(len(prompts)), key=lambda i: -lengths[i])
        self.queue = deque(i * G + j for i in order for j in range(G))
        self.holder, self.started, self.time, self.oldest = [], [], 0, 0
        self.place_of, self.logits_of, self.place_lengths = {}, {}, [1] * self.places
        self.graphs, self.pool = {}, None
        self.in_step, self.changed = False, False
        self.kv_heads = model.config.num_key_value_heads
        self.groups = Groups([None] * self.slots, self.kv_heads, self.places, G, self.device)

        def new(rows, value, dtype=torch.int64): return torch.full(rows, value, dtype=dtype, device=self.device)
        self.token, self.drawn, self.limit = (new((self.slots,), n) for n in (0, 1, 1))
        self.row, self.alive = new((self.slots,), self.B), new((self.slots,), False, torch.bool)
        self.tokens, self.logps = new((self.B + 1, self.T), 0), new((self.B + 1, self.T), 0.0, torch.float32)
        self.lengths, self.finished = new((self.B + 1,), 0), new((self.B + 1,), False, torch.bool)

    # ------------------------------------------------------------------------------------------ on the device, no waiting

    def step_rows(self):
        """Of the next step: the slots in use, and some more."""
        if self.static:
            return bucket(len(self.holder), self.slots, LEAST_ROWS)
        return max(len(self.holder), min(FEW_ROWS, self.slots))

    def is_little(self, rows):
        """Whether a step of so many rows (two FLOP for every weight and row, about) is little work for a CPU."""
        return self.device.type == "cpu" and 2 * rows * self.parameters < LITTLE_WORK

    def advance(self):
        """A few steps without a look at the outcome."""
        for _ in range(self.look_every):
            self.time += 1
            rows, used = self.step_rows(), min(self.time - self.oldest, self.T)
            if self.static:
                by_length = self.ascend or self.cache.flash         # kernels that know how many keys there are
                used = self.T if by_length else bucket(used, self.T, LEAST_SLOTS)
            if (rows, used) in self.graphs:
                self.graphs[rows, used]()
                continue
            self.step(rows, used)
            if self.graph:
                self.record(rows, used)

    def record(self, rows, used):
        """Keep a step of this shape as a device graph; without graphs from here on if the device refuses."""
        try:
            self.graphs[rows, used], self.pool = capture(lambda: self.step(rows, used), self.device, self.pool)
        except RuntimeError as error:
            self.graph, self.graphs = False, {}
            print(f"no device graph ({str(error).splitlines()[0]}): sampling without; --graph off says so from the start",
                  file=sys.stderr)

    def step(self, rows, used):
        """The last token of each of the first `rows` slots through the model, and the next one drawn."""
        host = None
        if self.ascend:
            own = [1 if row is None else min(self.time - t, self.T) for row, t in zip(self.holder, self.started)]
            host = self.place_lengths, own + [1] * (rows - len(own))
        logits = self.model.decode(self.token[:rows], self.drawn[:rows] - 1, self.groups, self.cache, used,
                                   used - 1 if self.in_step else None, host)
        self.draw(slice(rows), logits)

    def draw(self, slots, logits):
        """One token for each of the slots (a slice, or an index tensor) by its logits, written down."""
        row, drawn, alive = self.row[slots], self.drawn[slots], self.alive[slots]
        at = drawn.clamp_max(self.T - 1)
        temperature, top_k, top_p = self.sampling
        uniforms = self.uniforms[row.clamp_max(self.B - 1), at] if temperature > 0 else None
        ids, logps = draw(logits, uniforms, temperature, top_k, top_p)
        self.tokens[row, at], self.logps[row, at] = ids, logps
        stop, drawn = (ids[:, None] == self.eos_ids).any(-1), drawn + alive
        self.finished[row], self.lengths[row] = stop, drawn
        alive = alive & ~stop & (drawn < self.limit[slots])
        self.token[slots], self.drawn[slots], self.alive[slots] = ids, drawn, alive
        self.row[slots] = torch.where(alive, row, self.B)

    # ----------------------------------------------------------------------------------------- on the host, between steps

    def refill(self):
        """Let the finished go and the next of the queue in. False when all are done."""
        while True:
            for k, alive in enumerate(self.alive[:len(self.holder)].tolist()):      # waits for the device
                if not alive:
                    self.holder[k] = None
            empty = [k for k, row in enumerate(self.holder) if row is None]
            if not (self.queue and self.admit(empty + list(range(len(self.holder), self.slots)))):
                break                           # else look again: the first token of one that came in may have been its last
        # on the CPU stopped rows leave at once where what they would compute in a step is not little
        costly = not self.static and not self.is_little(len(empty))
        if costly or len(self.holder) - len(empty) <= LEAVE_AT * len(self.holder) or self.changed:
            self.compact(empty)
            self.arrange()
        return bool(self.holder)

    def admit(self, free):
        """Fill the free slots from the queue, as far as prompts find a place; draw the first tokens. How many came in."""
        if not free:
            return 0
        self.forget_prompts()
        room = sorted(set(range(self.places)) - set(self.place_of.values()), reverse=True)
        new, slots = [], []
        for k in free:
            prompt = self.next_prompt()
            if prompt is None or prompt not in self.place_of and not room:
                break
            if prompt not in self.place_of:
                self.place_of[prompt] = room.pop()
                new.append(prompt)
            self.holder += [None] * (k + 1 - len(self.holder))
            self.started += [0] * (k + 1 - len(self.started))
            self.holder[k], self.started[k] = self.queue.popleft(), self.time
            slots.append(k)
        if new:
            self.prefill(new)
        if slots:
            rows, at = [self.holder[k] for k in slots], self.tensor(slots)
            self.row[at], self.limit[at] = self.tensor(rows), self.tensor([self.limits[row] for row in rows])
            self.drawn[at], self.alive[at], self.changed = 0, True, True
            self.draw(at, torch.stack([self.logits_of[row // self.G] for row in rows]))
            self.logits_of = {p: x for p, x in self.logits_of.items() if p == self.next_prompt()}
        return len(slots)

    def next_prompt(self):
        """Of the completion at the head of the queue; None: it is empty. Completions come in prompt by prompt, so no other
        prompt that has come in already has completions waiting."""
        return self.queue[0] // self.G if self.queue else None

    def forget_prompts(self):
        """Give up the places of prompts whose completions are all done."""
        here = {row // self.G for row in self.holder if row is not None} | {self.next_prompt()}
        self.place_of = {p: place for p, place in self.place_of.items() if p in here}

    def prefill(self, new):
        """The new prompts' keys and values into their places, and the logits that their first tokens are drawn from."""
        places = [self.place_of[p] for p in new]
        logits = self.model.prefill([self.prompts[p] for p in new], self.cache, places)
        self.logits_of.update(zip(new, logits))

    def compact(self, empty):
        """Move the last slots, and the last prompts, into the gaps, so that a step computes little that nobody wants."""
        left = len(self.holder) - len(empty)
        moves = list(zip([k for k in range(left, len(self.holder)) if self.holder[k] is not None], empty))
        if moves:
            source, target = (self.tensor(x) for x in zip(*moves))
            self.cache.move_rows(source, target, min(self.time - self.oldest + 1, self.T))
            for x in (self.token, self.drawn, self.limit, self.row, self.alive):
                x[target] = x[source]
            for k, gap in moves:
                self.holder[gap], self.started[gap] = self.holder[k], self.started[k]
        del self.holder[left:], self.started[left:]
        self.row[left:], self.alive[left:], self.drawn[left:] = self.B, False, 1
        if 0 < left <= ONE_BLOCK and not self.queue:
            self.cache.join_blocks(self.step_rows(), self.spare_bytes)
        if self.static:         # all places are looked at, wherever the prompts are
            return
        self.forget_prompts()
        gaps = sorted(set(range(len(self.place_of))) - set(self.place_of.values()))
        moves = list(zip([p for p, place in self.place_of.items() if place >= len(self.place_of)], gaps))
        if moves:
            self.cache.move_prompts(*(self.tensor(x) for x in zip(*((self.place_of[p], gap) for p, gap in moves))))
            self.place_of.update(moves)

    def arrange(self):
        """Which prompt each slot reads, and how much of it there is."""
        places = [None if row is None else self.place_of[row // self.G] for row in self.holder]
        places += [None] * ((self.slots if self.static else self.step_rows()) - len(places))
        if self.static:
            self.groups.copy_(Groups(places, self.kv_heads, self.places, self.G, self.device))
        else:
            self.groups = Groups(places, self.kv_heads)
        running = {place: len(self.prompts[row // self.G]) for row, place in zip(self.holder, places) if row is not None}
        self.place_lengths = [running.get(i, 1) for i in range(self.places)]       # of a prompt that nobody reads: 1
        self.cache.prompt_lengths.copy_(self.tensor(self.place_lengths))
        started = [t for row, t in zip(self.holder, self.started) if row is not None]
        self.oldest, self.changed = min(started, default=self.time), False
        self.in_step = not self.static and self.oldest == max(started, default=self.time)

    def tensor(self, values):
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    # ------------------------------------------------------------------------------------------------------- the outcome

    def rollout(self, version):
        """Prompts and completions side by side. Outside inference mode: the tensors will meet autograd."""
        prompt_lengths = self.tensor([len(p) for p in self.prompts for _ in range(self.G)])
        lengths, finished = self.lengths[:-1] + prompt_lengths, self.finished[:-1].clone()
        T, longest = int(lengths.max()), max(len(p) for p in self.prompts)
        tokens = torch.tensor([[*p, *[0] * (longest - len(p))] for p in self.prompts], device=self.device)
        tokens = F.pad(tokens.repeat_interleave(self.G, 0), (0, max(0, T - longest)))[:, :T]
        behind = torch.arange(T, device=self.device) - prompt_lengths[:, None]        # index into the completion
        drawn = (behind >= 0) & (behind < self.lengths[:-1, None])
        at = behind.clamp(0, self.T - 1)
        return Rollout(torch.where(drawn, self.tokens[:-1].gather(1, at), tokens), prompt_lengths, lengths,
                       torch.where(drawn, self.logps[:-1].gather(1, at), 0.0), finished, version)


def parameters(model):
    """How many, over all ranks."""
    return sum(p.numel() for p in model.parameters())


def bucket(n, top, least=1):
    """The least of top, 3/4 top, 1/2 top, 3/8 top, 1/4 top, ... that is at least n, and `least` if top is: few shapes, at most
    half as much again."""
    n, size = max(n, min(least, top)), top
    while n <= -(-size // 2) < size:
        size = -(-size // 2)
    return -(-size * 3 // 4) if n <= -(-size * 3 // 4) else size


def check_request(prompts, group_size, max_new_tokens, temperature, config):
    """One ValueError line for a request that cannot be served."""
    if not prompts:
        raise ValueError("generate needs at least one prompt")
    if group_size < 1 or max_new_tokens < 1 or not 0 <= temperature < float("inf"):
        raise ValueError(f"group_size {group_size} and max_new_tokens {max_new_tokens} must be at least 1, "
                         f"temperature {temperature} a number from 0")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: give at least one token (bos, or the template's first)")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {i} has a token outside the vocabulary of {config.vocab_size}")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens: with {max_new_tokens} new ones it leaves the "
                             f"context of {config.max_position_embeddings}; lower --max-new-tokens")
