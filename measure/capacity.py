"""Formulas of what a run needs, before it is run: bytes on a chip, and communication of a step.

    python bench.py memory --predict         0.5B to 14B on 1, 8 and 20 chips, full and with LoRA
    python bench.py comm --predict           4B, 8B and 14B on 20 Ascend 910B, for each mesh

A step has two phases, whose memory is not needed at the same time:
    rollout     a copy of the weights in the compute dtype, keys and values
    training    gradients, gathered blocks, activations
Weights and Adam's moments stay through both. On the CPU the rows' own keys and values stay as well,
if they are small (ContinuousBatch.memory_to_keep).

Left out are a frozen reference (--beta) and the lagging weights (--sync-every): each is one more
copy in the compute dtype, over `shard` ranks. `bench.py memory` and `bench.py comm` measure what is
predicted here.

Throughout, c is a ModelConfig, and size the bytes of a number in the compute dtype. The weights are
cut over `shard` of the `world` chips, and repeated world / shard times.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.batching import KEEP_BYTES
from engine.decode import bytes_per_token
from engine.logps import logit_chunk

DTYPE = {2: torch.bfloat16, 4: torch.float32}       # by size
MASTER = 4          # bytes of a float32 weight, of each of Adam's two moments, and of a gradient
GB = 10 ** 9
MB = 2 ** 20


@dataclass
class Load:
    """The work of a step: prompts x group_size completions over all chips."""
    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int             # of the longest completion
    rows: int                   # completions at once on a chip, at most
    micro_batch_tokens: int
    mean_tokens: float = 0.0    # of a completion; 0: half of new_tokens
    checkpointing: bool = True
    lora_rank: int = 0          # 0: all weights are trained

    def prompts_of_rank(self, world):
        """Returns the prompts of the rank that has most of them."""
        return ceil_div(self.prompts, world)

    def rows_at_once(self, world):
        """Returns how many completions that rank draws at once."""
        return min(self.rows, self.prompts_of_rank(world) * self.group_size)

    def mean_length(self):
        """Returns the mean number of tokens of a completion."""
        return self.mean_tokens or self.new_tokens / 2

    def trained(self, world):
        """Returns the tokens that go through the model in training on that rank.

        The prompt of a group counts once."""
        of_group = self.prompt_tokens + self.group_size * self.mean_length()
        return self.prompts_of_rank(world) * of_group


class Counts(NamedTuple):
    """Numbers of parameters of a model."""
    everything: int
    block: int                  # one of the blocks
    root: int                   # outside of the blocks: embedding, last norm, an untied lm_head


def counts(c):
    """Returns the Counts of a model."""
    both = c.num_attention_heads + 2 * c.num_key_value_heads        # heads of q, k and v
    attention = c.hidden_size * c.head_dim * (both + c.num_attention_heads)
    mlp = 3 * c.hidden_size * c.intermediate_size
    norms = 2 * c.hidden_size + (2 * c.head_dim if c.qk_norm else 0)
    biases = c.head_dim * both if c.qkv_bias else 0

    block = attention + mlp + norms + biases
    heads = 1 if c.tie_word_embeddings else 2
    root = heads * c.vocab_size * c.hidden_size + c.hidden_size
    return Counts(c.num_hidden_layers * block + root, block, root)


def adapter_parameters(c, rank):
    """Returns how many numbers the adapters of rank r have: r (in + out) a layer (lora.py)."""
    queries = c.num_attention_heads * c.head_dim
    keys = c.num_key_value_heads * c.head_dim
    attention = (c.hidden_size + queries) * 2 + (c.hidden_size + keys) * 2      # q and o, k and v
    mlp = (c.hidden_size + c.intermediate_size) * 3
    return c.num_hidden_layers * rank * (attention + mlp)


def ceil_div(a, b):
    """Returns a / b, rounded up."""
    return -(-a // b)


# ------------------------------------------------------------------------------------------- memory

# the parts of memory(), by the time in which they are needed
STAY = ("weights", "moments")
ROLLOUT = ("inference_copy", "kv_cache", "sampling")
TRAINING = ("kv_kept", "gradients", "activations", "logits", "gathered")


def memory(c, load, world, shard, size, whole=False, on_cpu=False):
    """Returns {name: bytes on one chip} of all parts and both phases, and the "peak" of the phases.

    whole: plain python in float32, where nothing is gathered, and gradients of the embedding are
    added in place. on_cpu: the sampler copies lm_head apart from a tied embedding, and keeps its
    cache."""
    everything = counts(c).everything
    rows = load.rows_at_once(world)
    # a prompt keeps its seat until its last straggler has finished (engine/batching.py, room_for)
    prompts = min(load.prompts_of_rank(world), rows)
    token_bytes = bytes_per_token(c, DTYPE[size])           # of keys and values, in all layers
    own_keys = rows * load.new_tokens * token_bytes
    prompt_keys = prompts * load.prompt_tokens * token_bytes

    tokens = min(load.micro_batch_tokens, load.trained(world))          # of a micro-batch
    kept = activations(c, tokens, size, load.checkpointing)
    logits = 3 * 4 * min(logit_chunk("cpu" if on_cpu else "cuda"), tokens * c.vocab_size)

    trained, frozen = everything, 0
    if load.lora_rank:
        trained, frozen = adapter_parameters(c, load.lora_rank), everything

    parts = {
        "weights": (MASTER * trained + size * frozen) / shard,
        "moments": 2 * MASTER * trained / shard,
        "inference_copy": size * copied_parameters(c, whole, on_cpu),
        "kv_cache": own_keys + prompt_keys,
        "kv_kept": own_keys if on_cpu and own_keys <= KEEP_BYTES else 0,
        "sampling": 3 * 4 * rows * c.vocab_size,                        # three float32 (rows, V)
        "gradients": MASTER * trained / shard,
        "activations": kept,
        "logits": logits,                                               # three float32 chunks
        "gathered": 0 if whole else gathered(c, size, kept, logits, frozen > 0),
    }

    stay = sum(parts[name] for name in STAY)
    rollout = sum(parts[name] for name in ROLLOUT)
    if not whole:
        rollout = max(rollout, first_copies(c, size, on_cpu))
    training = sum(parts[name] for name in TRAINING)

    phases = {
        "rollout_phase": stay + rollout,
        "training_phase": stay + training,
        "peak": stay + max(rollout, training),
    }
    return {**parts, **phases}


def activations(c, tokens, size, checkpointing):
    """Returns the bytes that one micro-batch of so many tokens keeps for its backward."""
    both = c.num_attention_heads + 2 * c.num_key_value_heads

    # numbers a token of one block
    residual = 4 * c.hidden_size                # its input and the sum after attention, both normed
    projected = 3 * both * c.head_dim           # q, k, v before and after norm and rotation
    attended = 2 * c.num_attention_heads * c.head_dim       # what attention read and returned
    mlp = 4 * c.intermediate_size               # gate, up, silu and their product
    block = residual + projected + attended + mlp

    # with checkpointing: the input of every block, and one block whole, while it is recomputed
    if checkpointing:
        kept = c.num_hidden_layers * c.hidden_size + block
    else:
        kept = c.num_hidden_layers * block
    return size * tokens * (kept + 3 * c.hidden_size)


def copied_parameters(c, whole, on_cpu):
    """Returns how many numbers the sampler's copy of the weights has.

    Sharded weights are all copied, and on the CPU lm_head apart from a tied embedding. Of whole
    weights the sampler reads the embedding where it is."""
    everything = counts(c).everything
    head = c.vocab_size * c.hidden_size
    if whole:
        return everything if c.tie_word_embeddings else everything - head
    return everything + head if on_cpu and c.tie_word_embeddings else everything


def first_copies(c, size, on_cpu):
    """Returns the bytes while the outermost weights, the first, become the sampler's.

    They exist three times: as they arrive, put together, and copied."""
    root = counts(c).root
    head = c.vocab_size * c.hidden_size
    apart = head if on_cpu and c.tie_word_embeddings else 0
    return size * (3 * root + apart)


def gathered(c, size, activations, logits, frozen=False):
    """Returns the bytes that gathered weights and their gradients add to the training's peak.

    The weights outside of the blocks need most at one of two times. At the loss there is lm_head's
    gradient, in float32 and then in the compute dtype, beside activations and logits. At the end
    there are the gradients of all of them, for the reduction. A block comes on top. Frozen weights
    have no gradients: there are the outermost ones, and two blocks, of which one is prefetched."""
    _, block, root = counts(c)
    head = c.vocab_size * c.hidden_size
    if frozen:
        return size * (root + 2 * block)

    at_the_loss = MASTER * head + size * (root + head) + activations + logits
    at_the_end = (2 * size + MASTER) * root
    of_root = max(at_the_loss, at_the_end) - activations - logits
    return of_root + (3 * size + MASTER) * block


# ------------------------------------------------------------------------------------ communication

# Bus bandwidth in GB/s a chip, in a group of so many chips of one node of eight 910B. Measured by
# others (gameofdimension/limulidae). An HCCS link joins every pair, so small groups use few links.
INSIDE = {1: float("inf"), 2: 19, 4: 48, 8: 130}
BETWEEN = 25        # between nodes: 200 Gb/s RoCE a chip, nominal, not measured

CHIP = {"flops": 354e12, "bandwidth": 1.6e12}       # of a 910B2, nominal
ASSUMED = {
    "training_utilisation": 0.35,
    "decode_bandwidth_share": 0.4,
    "network_efficiency": 0.8,
}


@dataclass
class Collective:
    """A collective of a step: how often, and over how many ranks."""
    kind: str           # all_gather, reduce_scatter or all_reduce
    phase: str          # rollout or training
    times: int          # a step
    tensor_bytes: float # of the full tensor
    ranks: int


def traffic(c, world, shard, micro_batches, size, lora_rank=0):
    """Returns the Collectives of one step with one update. Those of one rank are left out.

    With LoRA all weights are still gathered, but only the adapters' gradients are reduced."""
    everything, _, root = counts(c)
    adapters = adapter_parameters(c, lora_rank)
    copies = world // shard

    # in a micro-batch a block is gathered for the forward and again for the backward
    trained_bytes = size * (2 * (everything + adapters - root) + root)
    gradient_bytes = MASTER * (adapters or everything)
    of_step = [
        Collective("all_gather", "rollout", 1, size * (everything + adapters), shard),
        Collective("all_gather", "training", micro_batches, trained_bytes, shard),
        Collective("reduce_scatter", "training", micro_batches, gradient_bytes, shard),
        Collective("all_reduce", "training", 1, gradient_bytes / shard, copies),
    ]
    return [collective for collective in of_step if collective.ranks > 1]


def bus(ranks, crosses):
    """Returns bytes/s of a ring of so many chips; crosses says whether it leaves a node."""
    measured = max(size for size in INSIDE if size <= ranks)
    gigabytes = INSIDE[measured]
    if crosses:
        gigabytes = min(gigabytes, BETWEEN * ASSUMED["network_efficiency"])
    return gigabytes * GB


def seconds(collective, crosses):
    """Returns the seconds of a collective by a ring, all its times together.

    (n - 1) / n of the tensor passes each of the n links, and twice for an all_reduce."""
    n = collective.ranks
    passes = 2 if collective.kind == "all_reduce" else 1
    return collective.times * passes * collective.tensor_bytes * (n - 1) / n / bus(n, crosses)


def crosses_nodes(world, shard, node=8):
    """Returns whether some shard group leaves its node, and whether some group of copies does.

    Ranks fill nodes of 8 in order."""
    starts = range(0, world, shard)
    shards_cross = any(first // node != (first + shard - 1) // node for first in starts)
    copies_cross = world > node
    return shards_cross, copies_cross


def compute_seconds(c, load, world, size):
    """Returns (rollout, training): seconds of a step without communication.

    They follow from the CHIP's rates at the ASSUMED utilisations."""
    everything = counts(c).everything
    flops = CHIP["flops"] * ASSUMED["training_utilisation"]
    bytes_s = CHIP["bandwidth"] * ASSUMED["decode_bandwidth_share"]

    # a token of every row: all weights and keys are read, or the arithmetic takes longer
    rows = load.rows_at_once(world)
    waves = ceil_div(load.prompts * load.group_size, world * rows)
    cached = rows * load.mean_length() / 2 + rows / load.group_size * load.prompt_tokens
    read = size * everything + bytes_per_token(c, DTYPE[size]) * cached
    token = max(read / bytes_s, 2 * everything * rows / flops)
    rollout = waves * load.new_tokens * token

    # FLOP a token and parameter: 2 forward, 4 backward (2 of a frozen weight, which has no
    # gradient), and 2 where the forward is repeated
    of_token = (2 + (2 if load.lora_rank else 4) + 2 * load.checkpointing) * everything
    training = of_token * load.trained(world) / flops
    return rollout, training


def step(c, load, world, shard, size=2):
    """Returns what a step of GRPO, one pass, costs on `world` chips in groups of `shard`.

    That is seconds of compute and of communication, and GB of memory. Nothing hides the
    communication here, though FSDP2 gathers a block while another computes. So "share", the part
    that is communication, is an upper bound. Left out are latency, evaluation, a reference model
    and off-policy passes."""
    micro_batches = max(1, ceil_div(round(load.trained(world)), load.micro_batch_tokens))
    shards_cross, copies_cross = crosses_nodes(world, shard)

    spent = {"rollout": 0, "training": 0}       # seconds of communication in each phase
    for collective in traffic(c, world, shard, micro_batches, size, load.lora_rank):
        crosses = copies_cross if collective.kind == "all_reduce" else shards_cross
        spent[collective.phase] += seconds(collective, crosses)

    rollout, training = compute_seconds(c, load, world, size)
    communication = spent["rollout"] + spent["training"]
    return {
        "mesh": [world // shard, shard],
        "micro_batches": micro_batches,
        "rollout_s": rollout,
        "training_s": training,
        "gather_for_rollout_s": spent["rollout"],
        "communication_in_training_s": spent["training"],
        "share": communication / (communication + rollout + training),
        "memory_gb": memory(c, load, world, shard, size)["peak"] / GB,
    }
