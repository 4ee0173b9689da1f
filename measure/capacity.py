"""What a run needs before it is run: bytes on a chip, and bytes and seconds of communication a step.

    python bench.py memory --predict                 full fine-tuning at 0.5B to 14B on 1, 8 and 20 chips
    python bench.py comm --predict                   4B, 8B and 14B on 20 Ascend 910B, for each mesh

A step has two phases whose memory is not needed at the same time: the rollout (a copy of the weights in the compute dtype, keys
and values) and the training (gradients, gathered blocks, activations). Weights and Adam's moments stay through both, and so do
on the CPU the rows' own keys and values, if they are little (Sampler.keep). Not counted: a frozen reference (--beta) and the
lagging weights (--sync-every), each a copy in the compute dtype over `shard` ranks. `bench.py memory` and `bench.py comm` measure
what is predicted here.
"""
from dataclasses import dataclass

import torch

from engine.batching import KEEP_BYTES
from engine.decode import bytes_per_token
from engine.logps import logit_chunk

DTYPE = {2: torch.bfloat16, 4: torch.float32}
MASTER = 4          # bytes of a float32 weight, as of each of Adam's two moments, and of a gradient
GB, MB = 10 ** 9, 2 ** 20


@dataclass
class Load:
    """A step: prompts x group_size completions over all chips, at most rows of them at once on a chip."""
    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int             # of the longest completion
    rows: int
    micro_batch_tokens: int
    mean_tokens: float = 0.0    # of a completion; 0: half of new_tokens
    checkpointing: bool = True

    def trained(self, world):
        """Tokens that go through the model in training, on the rank that has most prompts: a group's prompt once."""
        return -(-self.prompts // world) * (self.prompt_tokens + self.group_size * (self.mean_tokens or self.new_tokens / 2))


def counts(c):
    """(all parameters, those of one block, those outside of the blocks: embedding, last norm, and lm_head if it is another)."""
    attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    norms = 2 * c.hidden_size + (2 * c.head_dim if c.qk_norm else 0)
    biases = c.head_dim * (c.num_attention_heads + 2 * c.num_key_value_heads) if c.qkv_bias else 0
    block = attention + 3 * c.hidden_size * c.intermediate_size + norms + biases
    root = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2) + c.hidden_size
    return c.num_hidden_layers * block + root, block, root


# ----------------------------------------------------------------------------------------------------------- memory

def activations(c, tokens, size, checkpointing):
    """Bytes that one micro-batch keeps for its backward; size: bytes of a number in the compute dtype."""
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    # of a block: its input and the sum after attention, both normed; q, k, v before and after norm and rotation; what
    # attention read and returned; gate, up, silu and their product
    block = 4 * c.hidden_size + (3 * heads + 2 * c.num_attention_heads) * c.head_dim + 4 * c.intermediate_size
    kept = c.num_hidden_layers * (c.hidden_size if checkpointing else block) + (block if checkpointing else 0)
    return size * tokens * (kept + 3 * c.hidden_size)


def memory(c, load, world, shard, size, whole=False, on_cpu=False):
    """Bytes on one chip, by part, and their "peak" over the two phases.

    size: bytes of a number in the compute dtype. whole: plain python in float32, where nothing is gathered and gradients of
    the embedding are added in place. on_cpu: the sampler copies lm_head apart from a tied embedding, and keeps its cache."""
    everything, block, root = counts(c)
    head = c.vocab_size * c.hidden_size
    part = {"weights": MASTER * everything / shard, "moments": 2 * MASTER * everything / shard}
    tied_twice = on_cpu and c.tie_word_embeddings
    part["inference_copy"] = size * (everything + (head if tied_twice and not whole else 0)
                                     - (head if whole and not c.tie_word_embeddings else 0))
    rows = min(load.rows, -(-load.prompts // world) * load.group_size)
    prompts = min(-(-load.prompts // world), 2 * -(-rows // load.group_size))
    of_token = bytes_per_token(c, DTYPE[size])
    own = rows * load.new_tokens * of_token
    part["kv_cache"], part["kv_kept"] = own + prompts * load.prompt_tokens * of_token, own if on_cpu and own <= KEEP_BYTES else 0
    part["sampling"] = 4 * 3 * rows * c.vocab_size
    part["gradients"] = MASTER * everything / shard
    tokens = min(load.micro_batch_tokens, load.trained(world))
    part["activations"] = activations(c, tokens, size, load.checkpointing)
    part["logits"] = 3 * 4 * min(logit_chunk("cpu" if on_cpu else "cuda"), tokens * c.vocab_size)
    if not whole:       # lm_head's gradient in float32, then in the compute dtype; at the end all of the root for the reduction
        loss, end = 4 * head + size * (root + head) + part["activations"] + part["logits"], (2 * size + MASTER) * root
        part["gathered"] = max(loss, end) - part["activations"] - part["logits"] + (3 * size + MASTER) * block
    else:
        part["gathered"] = 0
    stays = part["weights"] + part["moments"]
    rollout = part["inference_copy"] + part["kv_cache"] + part["sampling"]
    if not whole:       # the outermost weights come first: as they arrive, put together, and copied
        rollout = max(rollout, size * (3 * root + (head if tied_twice else 0)))
    training = part["kv_kept"] + part["gradients"] + part["activations"] + part["logits"] + part["gathered"]
    return {**part, "rollout_phase": stays + rollout, "training_phase": stays + training, "peak": stays + max(rollout, training)}


# ------------------------------------------------------------------------------------------------------ communication

# Bus bandwidth, GB/s a chip, in a group of n chips of one node of eight 910B: measured by others (gameofdimension/limulidae); an
# HCCS link joins every pair, so small groups use few links. Between nodes: 200 Gb/s RoCE a chip, nominal, not measured.
INSIDE = {1: float("inf"), 2: 19, 4: 48, 8: 130}
BETWEEN = 25
CHIP = {"flops": 354e12, "bandwidth": 1.6e12}       # of a 910B2, nominal
ASSUMED = {"training_utilisation": 0.35, "decode_bandwidth_share": 0.4, "network_efficiency": 0.8}


def bus(n, crosses):
    """Bytes/s of a ring of n chips; crosses: it leaves a node."""
    inside = INSIDE[max(k for k in INSIDE if k <= n)]
    return (min(inside, BETWEEN * ASSUMED["network_efficiency"]) if crosses else inside) * GB


def traffic(c, world, shard, micro_batches, size):
    """[(collective, phase, times a step, bytes of the full tensor, ranks)] of one step with one update."""
    everything, block, root = counts(c)
    blocks, reduced = everything - root, MASTER * everything
    rows = [("all_gather", "rollout", 1, size * everything, shard),
            ("all_gather", "training", micro_batches, size * (2 * blocks + root), shard),
            ("reduce_scatter", "training", micro_batches, reduced, shard),
            ("all_reduce", "training", 1, reduced / shard, world // shard)]
    return [row for row in rows if row[-1] > 1]


def seconds(row, crosses):
    """Of a row of traffic by a ring: (n - 1) / n of the tensor passes each link, twice for an all_reduce."""
    kind, _, times, size, n = row
    return times * (2 if kind == "all_reduce" else 1) * size * (n - 1) / n / bus(n, crosses)


def crosses_nodes(world, shard, node=8):
    """(whether some shard group, whether some group of copies leaves a node) when ranks fill nodes of 8 in order."""
    shards = any(first // node != (first + shard - 1) // node for first in range(0, world, shard))
    return shards, world > node


def compute_seconds(c, load, world, size):
    """(rollout, training) of a step without communication, at the assumed utilisations."""
    everything, *_ = counts(c)
    rows = min(load.rows, -(-load.prompts // world) * load.group_size)
    waves = -(-(load.prompts * load.group_size) // (world * rows))
    mean = load.mean_tokens or load.new_tokens / 2
    read = size * everything + bytes_per_token(c, DTYPE[size]) * (rows * mean / 2 + rows / load.group_size * load.prompt_tokens)
    token = max(read / (CHIP["bandwidth"] * ASSUMED["decode_bandwidth_share"]),
                2 * everything * rows / (CHIP["flops"] * ASSUMED["training_utilisation"]))
    flops = (8 if load.checkpointing else 6) * everything * load.trained(world)
    return waves * load.new_tokens * token, flops / (CHIP["flops"] * ASSUMED["training_utilisation"])


def step(c, load, world, shard, size=2):
    """What a step of GRPO, one pass, costs on world chips in groups of `shard`: seconds of compute and of communication.

    Nothing hides the communication here, though FSDP2 gathers a block while another computes: "share" is an upper bound for that.
    Latency, evaluation, a reference model and off-policy passes are left out."""
    micro_batches = max(1, -(-round(load.trained(world)) // load.micro_batch_tokens))
    crossing = crosses_nodes(world, shard)
    rows = traffic(c, world, shard, micro_batches, size)
    spent = [seconds(row, crossing[row[0] == "all_reduce"]) for row in rows]
    rollout, training = compute_seconds(c, load, world, size)
    gather = sum(t for row, t in zip(rows, spent) if row[1] == "rollout")
    return {"mesh": [world // shard, shard], "micro_batches": micro_batches, "rollout_s": rollout, "training_s": training,
            "gather_for_rollout_s": gather, "communication_in_training_s": sum(spent) - gather,
            "share": sum(spent) / (sum(spent) + rollout + training), "memory_gb": memory(c, load, world, shard, size)["peak"] / GB}
