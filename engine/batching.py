"""Continuous batching: completions take turns in a fixed number of slots of the KV cache.

    waiting completions -> slots -> a step draws one token a slot -> finished leave, others come in

    while batch.refill():       # on the host: finished completions leave, waiting ones come in
        batch.advance()         # on the device: a few steps, each draws one token a slot

A slot whose completion has finished goes to the next that waits, so a long tail never holds the
batch (iteration-level batching, Orca, OSDI 2022). A prompt goes through the model once and keeps a
seat in the cache, where its keys and values serve its whole group (decode.py). Slots and seats are
as many as a budget in bytes allows, so the memory is known before the first token. When nothing
waits any more, the slots that are left move together.

Each kind of state has its class. Schedule knows who waits and who sits where, in plain Python on
the host. Slots holds what a step reads and writes, in tensors on the device. ContinuousBatch drives
the two. On accelerators the host looks for finished completions every few steps only, and a step
may be a device graph.

Left out are pages of keys, so a slot reserves the keys of the longest completion, and preemption,
which a slot with all its keys reserved never needs. rollout.py is what calls this file.
"""
import math
import sys
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.decode import (ONE_BLOCK, Cache, Groups, bytes_per_token, capture, own_blocks,
                           prompt_slots)
from engine.machine import free_bytes
from engine.sampling import draw

LEAVE_AT = 0.9      # alive share of slots at which the stopped leave: this copies, staying computes
LOOK_EVERY = 8      # steps between two looks at what has stopped, on accelerators (a look waits)
KV_SHARE = 0.8      # share of the free memory that keys and values may take
KEEP_BYTES = 2 ** 30        # most bytes of slots' keys and values kept from rollout to rollout
FEW_ROWS = 6        # least rows of a step on the CPU: oneDNN takes longer for fewer than for six
LEAST_ROWS = 8      # least rows of a step elsewhere: fewer shapes, and so fewer graphs to capture
LEAST_KEYS = 128    # least keys of a step elsewhere, for the same reason
LITTLE_WORK = 5 * 10 ** 7   # FLOP of a step: less is not worth a second thread, nor leaving early


@dataclass
class Request:
    """One call of the sampler, for B = N x G completions of at most T tokens, prompt-major.

    A completion c is a number from 0 to B - 1, and c // G is the number of its prompt."""
    prompts: list[list[int]]        # N lists of token ids
    group_size: int                 # G
    limits: list[int]               # (B,) the most tokens of each completion; T is the largest
    eos_ids: torch.Tensor           # (E,) int64, the ids that end a completion
    uniforms: torch.Tensor          # (B, T, 2) random numbers of each token; greedy: (B, 0, 2)
    temperature: float = 1.0        # 0 is greedy
    top_k: int = 0                  # 0: all ids
    top_p: float = 1.0              # 1: all ids


def check_request(prompts, group_size, max_new_tokens, temperature, config):
    """Raises ValueError, one line, for a request that cannot be served."""
    if not prompts:
        raise ValueError("generate needs at least one prompt")
    if group_size < 1 or max_new_tokens < 1:
        raise ValueError(f"group_size {group_size} and max_new_tokens {max_new_tokens} must be at "
                         "least 1")
    if temperature != 0 and not 1e-4 <= temperature <= 1e4:     # logits / 1e-40 are not finite
        raise ValueError(f"temperature {temperature} must be 0, or a number from 0.0001 to 10000")

    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: give at least one token (bos, or the "
                             "template's first)")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {i} has a token outside the vocabulary of "
                             f"{config.vocab_size}")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens: with {max_new_tokens} new ones it leaves "
                f"the context of {config.max_position_embeddings}; lower --max-new-tokens")


# ------------------------------------------------------------------------------------------- memory

@dataclass
class Room:
    """The size of a cache."""
    slots: int          # completions in the cache at once
    seats: int          # prompts in the cache at once
    spare_bytes: int    # what the cache leaves of the budget


def room_for(request, model, max_slots, budget_bytes=0):
    """Returns the largest Room of at most max_slots slots that fits into budget_bytes.

    Without a budget it is KV_SHARE of the memory that is free, with the slots' logits in it. Raises
    ValueError when keys and values of one completion are beyond the budget."""
    token_bytes = bytes_per_token(model.config, model.dtype)
    longest_prompt = max(len(prompt) for prompt in request.prompts)
    seat_bytes = prompt_slots(longest_prompt, model.device) * token_bytes
    max_new_tokens = max(request.limits)
    logits_bytes = 0
    if not budget_bytes:
        logits_bytes = 16 * model.config.vocab_size     # a slot's in float32, a few times over
        budget_bytes = int(KV_SHARE * free_bytes(model.device))

    def bytes_of(slots):
        keys = math.prod(own_blocks(max_new_tokens, model.device, slots))
        return slots * (keys * token_bytes + logits_bytes)

    def fits(slots):        # with seats for twice as many groups as fill the slots
        seats = min(len(request.prompts), 2 * ceil_div(slots, request.group_size))
        return bytes_of(slots) + seats * seat_bytes <= budget_bytes

    least_bytes = bytes_of(1) + seat_bytes
    if least_bytes > budget_bytes:
        raise ValueError(
            f"keys and values of one completion take {least_bytes / 2 ** 20:.0f} MB, the budget is "
            f"{budget_bytes / 2 ** 20:.0f} MB: lower --max-new-tokens, or raise --kv-memory-mb, "
            "or free memory")

    slots = min(max(1, max_slots), len(request.limits))
    while slots > 1 and not fits(slots):
        slots -= 1

    # a prompt keeps its seat until its last straggler has finished: there are as many seats as the
    # budget has room for, so that no slot stays free for want of one
    left_bytes = budget_bytes - bytes_of(slots)
    seats = min(len(request.prompts), slots, left_bytes // seat_bytes)
    return Room(slots, seats, left_bytes - seats * seat_bytes)


# -------------------------------------------------------------------------------------- on the host

class Schedule:
    """Who waits and who sits where: plain lists and dicts, which change between steps only."""

    def __init__(self, prompts, group_size, room):
        self.group_size = group_size
        self.slot_count = room.slots
        self.seat_count = room.seats

        # long prompts first, so that prompts in the cache together have like lengths
        order = sorted(range(len(prompts)), key=lambda prompt: -len(prompts[prompt]))
        self.waiting = deque(prompt * group_size + j for prompt in order for j in range(group_size))
        self.running = []       # by slot: the completion that it draws; None: its last has finished
        self.since = []         # by slot: the number of steps before its completion came in
        self.seat_of = {}       # by prompt: where in the cache its keys and values are
        self.time = 0           # the number of steps so far

    def prompt_of(self, completion):
        """Returns the number of a completion's prompt."""
        return completion // self.group_size

    def next_prompt(self):
        """Returns the prompt of the first completion that waits, or None.

        Completions come in prompt by prompt, so all others that have a seat have none that wait."""
        return self.prompt_of(self.waiting[0]) if self.waiting else None

    def empty_slots(self):
        """Returns the slots in use whose completion has finished."""
        return [slot for slot, completion in enumerate(self.running) if completion is None]

    def ages(self):
        """Returns the steps that each slot's completion has taken; 1 for a slot without one."""
        return [1 if completion is None else self.time - since
                for completion, since in zip(self.running, self.since)]

    def release(self, alive):
        """Empties the slots in use that are not alive (a list of bools)."""
        for slot, still_draws in enumerate(alive):
            if not still_draws:
                self.running[slot] = None

    def admit(self):
        """Lets completions that wait into free slots, as long as their prompts find seats.

        Returns the slots that were filled, and the prompts that were given a seat."""
        free_slots = self.empty_slots() + list(range(len(self.running), self.slot_count))
        filled, seated = [], []
        if not self.waiting or not free_slots:
            return filled, seated

        self.free_seats()
        free_seats = sorted(set(range(self.seat_count)) - set(self.seat_of.values()), reverse=True)
        for slot in free_slots:
            prompt = self.next_prompt()
            if prompt is None:
                break
            if prompt not in self.seat_of:
                if not free_seats:
                    break
                self.seat_of[prompt] = free_seats.pop()
                seated.append(prompt)

            if slot == len(self.running):       # one that was not in use yet
                self.running.append(None)
                self.since.append(0)
            self.running[slot] = self.waiting.popleft()
            self.since[slot] = self.time
            filled.append(slot)
        return filled, seated

    def free_seats(self):
        """Frees the seats of prompts whose completions have all finished."""
        needed = {self.prompt_of(c) for c in self.running if c is not None} | {self.next_prompt()}
        self.seat_of = {prompt: seat for prompt, seat in self.seat_of.items() if prompt in needed}

    def close_slots(self):
        """Moves the last completions into empty slots before them, and drops the slots behind.

        Returns the moves, a list of pairs (slot, the slot that it moved to)."""
        empty = self.empty_slots()
        left = len(self.running) - len(empty)
        last = [s for s in range(left, len(self.running)) if self.running[s] is not None]
        moves = list(zip(last, empty))
        for source, target in moves:
            self.running[target] = self.running[source]
            self.since[target] = self.since[source]

        del self.running[left:]
        del self.since[left:]
        return moves

    def close_seats(self):
        """Moves prompts into free seats before them, so that the seats in use are the first ones.

        Returns the moves, a list of pairs (seat, the seat that it moved to)."""
        self.free_seats()
        in_use = len(self.seat_of)
        free = sorted(set(range(in_use)) - set(self.seat_of.values()))
        behind = [prompt for prompt, seat in self.seat_of.items() if seat >= in_use]
        moves = [(self.seat_of[prompt], seat) for prompt, seat in zip(behind, free)]
        self.seat_of.update(zip(behind, free))
        return moves


# ------------------------------------------------------------------------------------ on the device

class Slots:
    """What a step reads and writes, in tensors that stay where they are: a step may be a graph.

    Nothing here waits for the device. A slot that is not alive draws on, into a spare last row of
    the tables, until the host takes it away."""

    def __init__(self, count, request, device):
        self.request = request
        self.max_new_tokens = max(request.limits)       # T
        self.spare = len(request.limits)                # B, the number of the tables' spare row
        self.eos_ids = request.eos_ids
        self.uniforms = request.uniforms

        def full(shape, value, dtype=torch.int64):
            return torch.full(shape, value, dtype=dtype, device=device)

        # by slot: how its completion stands
        self.completion = full((count,), self.spare)    # its number; `spare` once it has stopped
        self.token = full((count,), 0)                  # the last token that was drawn
        self.drawn = full((count,), 1)                  # how many tokens have been drawn
        self.limit = full((count,), 1)                  # the most tokens to draw
        self.alive = full((count,), False, torch.bool)  # whether it wants more tokens

        # by completion: the tables of what was drawn, (B + 1, T) and (B + 1,)
        rows = self.spare + 1
        self.tokens = full((rows, self.max_new_tokens), 0)
        self.logps = full((rows, self.max_new_tokens), 0.0, torch.float32)
        self.lengths = full((rows,), 0)                 # how many tokens have been drawn
        self.finished = full((rows,), False, torch.bool)        # whether the last one is a stop id

    def fill(self, slots, completions, logits):
        """Begins completions in slots (lists) with their first tokens, from logits (slots, V)."""
        at = indices(slots, logits.device)
        limits = [self.request.limits[completion] for completion in completions]
        self.completion[at] = indices(completions, logits.device)
        self.limit[at] = indices(limits, logits.device)
        self.drawn[at] = 0
        self.alive[at] = True
        self.draw(at, logits)

    def draw(self, slots, logits):
        """Draws and records a token for each of R slots (a slice or indices) from logits (R, V)."""
        request = self.request
        completion = self.completion[slots]                                     # (R,)
        drawn = self.drawn[slots]                                               # (R,)
        alive = self.alive[slots]                                               # (R,)

        # a slot that is not alive may stand at or behind the end of the table
        position = drawn.clamp_max(self.max_new_tokens - 1)                     # (R,)
        uniforms = None
        if request.temperature > 0:
            uniforms = self.uniforms[completion.clamp_max(self.spare - 1), position]    # (R, 2)
        ids, logps = draw(logits, uniforms, request.temperature, request.top_k, request.top_p)
        self.tokens[completion, position] = ids
        self.logps[completion, position] = logps

        stopped = (ids[:, None] == self.eos_ids).any(-1)                        # (R,)
        drawn = drawn + alive
        self.finished[completion] = stopped
        self.lengths[completion] = drawn

        alive = alive & ~stopped & (drawn < self.limit[slots])
        self.token[slots] = ids
        self.drawn[slots] = drawn
        self.alive[slots] = alive
        self.completion[slots] = torch.where(alive, completion, self.spare)

    def move(self, source, target):
        """Copies the state of slots `source` to slots `target` (index tensors)."""
        for x in (self.token, self.drawn, self.limit, self.completion, self.alive):
            x[target] = x[source]

    def clear(self, first):
        """Puts the slots from `first` on out of use."""
        self.completion[first:] = self.spare
        self.alive[first:] = False
        self.drawn[first:] = 1

    def outcome(self):
        """Returns tokens and log-probs (B, T), lengths and finished (B,) of all completions."""
        return self.tokens[:-1], self.logps[:-1], self.lengths[:-1], self.finished[:-1]


# --------------------------------------------------------------------------------------- the driver

class ContinuousBatch:
    """The completions of one request on their way through the model.

    model: an InferenceModel. parameters: how many it has. graph: whether steps are to be device
    graphs. memory: Cache.memory of a cache that nobody reads any more, or None."""

    def __init__(self, model, request, room, parameters, graph=False, memory=None):
        self.model = model
        self.prompts = request.prompts
        self.group_size = request.group_size
        self.parameters = parameters
        self.device = model.device
        self.kv_heads = model.config.num_key_value_heads
        self.spare_bytes = room.spare_bytes

        self.schedule = Schedule(request.prompts, request.group_size, room)
        self.slots = Slots(room.slots, request, self.device)
        self.max_new_tokens = self.slots.max_new_tokens
        longest_prompt = max(len(prompt) for prompt in request.prompts)
        self.cache = Cache(model.config, room.seats, longest_prompt, room.slots,
                           self.max_new_tokens, self.device, model.dtype, memory)

        # what the device asks for: static shapes step after step, a look every few steps, graphs by
        # shape, and lengths on the host for Ascend's attention kernel, within that kernel's limits
        self.static = self.device.type != "cpu"
        self.look_every = LOOK_EVERY if self.static else 1
        self.graph = graph
        self.graphs = {}                # by (rows, keys) of a step: a callable that replays it
        self.graph_pool = None
        self.ascend = (self.device.type == "npu" and not graph and model.dtype != torch.float32
                       and model.config.head_dim % 16 == 0)

        # what `arrange` derives from the schedule
        self.groups = Groups([None] * room.slots, self.kv_heads, room.seats, self.group_size,
                             self.device)           # which seat each slot reads
        self.seat_lengths = [1] * room.seats        # of the prompt in each seat; 1: nobody reads it
        self.oldest = 0                             # the earliest Schedule.since
        self.in_step = False                        # whether all slots have drawn equally many
        self.first_logits = {}      # by prompt: logits (V,) that first tokens are drawn from

    # ----------------------------------------------------------------- between steps, on the host

    def refill(self):
        """Lets finished completions go and waiting ones in. Returns False when all are done."""
        schedule = self.schedule
        came_in = False
        self.release_finished()
        while self.admit():
            came_in = True
            self.release_finished()     # the first token of one that came in may have been its last

        # on the CPU stopped ones leave at once where what they would cost in a step is not little
        empty = len(schedule.empty_slots())
        costly = not self.static and not self.is_little(empty)
        few = len(schedule.running) - empty <= LEAVE_AT * len(schedule.running)
        if came_in or costly or few:
            self.compact()
            self.arrange()
        return bool(schedule.running)

    def release_finished(self):
        """Looks at which slots have stopped, which waits for the device, and empties them."""
        in_use = len(self.schedule.running)
        self.schedule.release(self.slots.alive[:in_use].tolist())

    def admit(self):
        """Lets completions in and draws their first tokens. Returns whether any came in."""
        schedule = self.schedule
        filled, seated = schedule.admit()
        if seated:
            self.prefill(seated)
        if not filled:
            return False

        completions = [schedule.running[slot] for slot in filled]
        logits = [self.first_logits[schedule.prompt_of(c)] for c in completions]
        self.slots.fill(filled, completions, torch.stack(logits))

        # only the next prompt may have completions left that still want its logits
        following = schedule.next_prompt()
        self.first_logits = {p: x for p, x in self.first_logits.items() if p == following}
        return True

    def prefill(self, prompts):
        """Sends prompts (their numbers) through the model, which writes their keys and values."""
        seats = [self.schedule.seat_of[prompt] for prompt in prompts]
        logits = self.model.prefill([self.prompts[p] for p in prompts], self.cache, seats)
        self.first_logits.update(zip(prompts, logits))

    def compact(self):
        """Moves slots, and seats, into gaps, so that a step computes little that nobody wants."""
        schedule = self.schedule
        moves = schedule.close_slots()
        if moves:
            source, target = self.pairs(moves)
            keys = min(schedule.time - self.oldest + 1, self.max_new_tokens)
            self.cache.move_rows(source, target, keys)
            self.slots.move(source, target)

        in_use = len(schedule.running)
        self.slots.clear(in_use)
        if 0 < in_use <= ONE_BLOCK and not schedule.waiting:
            self.cache.join_blocks(self.step_rows(), self.spare_bytes)

        # with static shapes a step looks at all seats, wherever the prompts are
        if not self.static:
            moves = schedule.close_seats()
            if moves:
                self.cache.move_prompts(*self.pairs(moves))

    def arrange(self):
        """Notes which seat each slot reads, how long the prompt there is, and the slots' ages."""
        schedule = self.schedule
        prompts = [schedule.prompt_of(completion) for completion in schedule.running]
        seats = [schedule.seat_of[prompt] for prompt in prompts]
        rows = schedule.slot_count if self.static else self.step_rows()
        padded = seats + [None] * (rows - len(seats))
        if self.static:
            self.groups.copy_(Groups(padded, self.kv_heads, schedule.seat_count, self.group_size,
                                     self.device))
        else:
            self.groups = Groups(padded, self.kv_heads)

        lengths = {seat: len(self.prompts[prompt]) for seat, prompt in zip(seats, prompts)}
        self.seat_lengths = [lengths.get(seat, 1) for seat in range(schedule.seat_count)]
        self.cache.prompt_lengths.copy_(indices(self.seat_lengths, self.device))

        self.oldest = min(schedule.since, default=schedule.time)
        newest = max(schedule.since, default=schedule.time)
        self.in_step = not self.static and self.oldest == newest

    def pairs(self, moves):
        """Returns moves, a list of pairs, as two index tensors (source, target)."""
        return [indices(side, self.device) for side in zip(*moves)]

    # ------------------------------------------------------------ on the device, without waiting

    def advance(self):
        """Makes a few steps without a look at their outcome."""
        with one_thread(self.is_little(self.step_rows())):
            for _ in range(self.look_every):
                self.schedule.time += 1
                self.replay_or_step(self.step_rows(), self.step_keys())

    def step_rows(self):
        """Returns the rows of the next step: the slots in use, rounded up to a fast shape."""
        in_use = len(self.schedule.running)
        if self.static:
            return bucket(in_use, self.schedule.slot_count, LEAST_ROWS)
        return max(in_use, min(FEW_ROWS, self.schedule.slot_count))

    def step_keys(self):
        """Returns the own keys that the next step looks at: the oldest slot's, rounded up."""
        used = min(self.schedule.time - self.oldest, self.max_new_tokens)
        if not self.static:
            return used
        if self.ascend or self.cache.flash:     # these kernels know how many keys there are
            return self.max_new_tokens
        return bucket(used, self.max_new_tokens, LEAST_KEYS)

    def is_little(self, rows):
        """Returns whether a step of so many rows is little work for a CPU.

        A step takes about two FLOP for every weight and row."""
        return self.device.type == "cpu" and 2 * rows * self.parameters < LITTLE_WORK

    def replay_or_step(self, rows, keys):
        """Makes a step by its device graph, if there is one of this shape; else records one."""
        if (rows, keys) in self.graphs:
            self.graphs[rows, keys]()
            return
        self.step(rows, keys)
        if self.graph:
            self.record(rows, keys)

    def step(self, rows, keys):
        """Sends the last tokens of the first `rows` slots through the model and draws the next."""
        slots = self.slots
        own = slots.drawn[:rows] - 1        # tokens drawn before the last one
        same = keys - 1 if self.in_step else None
        host_lengths = None
        if self.ascend:
            ages = [min(age, self.max_new_tokens) for age in self.schedule.ages()]
            host_lengths = self.seat_lengths, ages + [1] * (rows - len(ages))

        logits = self.model.decode(slots.token[:rows], own, self.groups, self.cache, keys, same,
                                   host_lengths)        # (rows, V)
        slots.draw(slice(rows), logits)

    def record(self, rows, keys):
        """Keeps a step of this shape as a device graph.

        If the device refuses, this and all later steps run without graphs."""
        def step():
            self.step(rows, keys)
        try:
            self.graphs[rows, keys], self.graph_pool = capture(step, self.device, self.graph_pool)
        except RuntimeError as error:
            self.graph = False
            self.graphs = {}
            print(f"no device graph ({str(error).splitlines()[0]}): sampling without; "
                  "--graph off says so from the start", file=sys.stderr)

    # -------------------------------------------------------------------------------- at the end

    def memory_to_keep(self):
        """Returns the slots' key/value memory for the next rollout's cache, or None.

        It is worth keeping on the CPU, where new pages of the system may cost a tenth of a rollout,
        and only if it is small. What a broken model has written is not kept: a mask hides any
        number, but not NaN."""
        k, v = self.cache.memory            # (layers, blocks, slots, Hkv, keys of a block, D)
        if k.device.type != "cpu" or 2 * k.nbytes > min(KEEP_BYTES, free_bytes(k.device) // 8):
            return None
        steps = min(self.schedule.time, self.max_new_tokens)
        written = ceil_div(steps, k.shape[4])       # blocks
        whole = all(x[:, :written].sum().isfinite() for x in (k, v))
        return (k, v) if whole else None


# ------------------------------------------------------------------------------------------ helpers

def bucket(n, top, least=1):
    """Returns the smallest of top, 3/4 top, 1/2 top, 3/8 top, 1/4 top, ... that is at least n.

    These are few shapes, and none is more than half as much again. It is at least `least`, too, if
    top is."""
    n = max(n, min(least, top))
    size = top
    while n <= ceil_div(size, 2) < size:
        size = ceil_div(size, 2)
    three_quarters = ceil_div(size * 3, 4)
    return three_quarters if n <= three_quarters else size


def ceil_div(a, b):
    """Returns a / b rounded up, for integers."""
    return -(-a // b)


def indices(values, device):
    """Returns a list of integers as an int64 tensor."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def parameter_count(model):
    """Returns the number of parameters, over all ranks."""
    return sum(p.numel() for p in model.parameters())


@contextmanager
def one_thread(wanted):
    """While open, PyTorch computes on one thread of the CPU, if that is wanted."""
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
