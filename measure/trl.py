"""`bench.py train --vs trl`: a whole GRPO step here and in TRL's GRPOTrainer, in turns.

Both sides run in one process and start from the same weights. The same for both are prompts, group
size, limits, stop tokens, reward function, learning rate, clipping and threads. So is the
objective, TRL's "dapo": all tokens averaged, no KL. Both compute in float32 on the CPU, without
activation checkpointing. A step is everything from prompts to new weights: drawing, decoding,
rewards, loss, optimizer. TRL draws with transformers.generate, as it does by default.

With --model and --data the prompts are questions in the checkpoint's own template, which both sides
turn into the same ids. With --lora-rank both train adapters of the same rank and alpha on all
linear layers of the blocks, TRL through PEFT (pip install peft).

The losses are compared on TRL's own first batch, and stand beside each other in the result, with
the gradient norms. This module is apart from measure/learner.py because it imports
TRL (pip install trl).
"""
import itertools
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, __version__

import dist
import grpo
import lora
import prompts
from config import Config
from engine.weights import write_json
from measure import common
from model import Transformer
from rollout import Rollout, Sampler

STOPS = list(range(1, 13))      # of 512 ids: random weights stop after 33 of 64 tokens in the mean


# ---------------------------------------------------------------------------- what both sides share

@dataclass
class Work:
    """The prompts of every step, and how text and ids go together."""
    tokenizer: object
    texts: list             # of the prompts, for TRL
    ids: list               # of the prompts, for us
    stops: list             # ids that end a completion


def work_of(args, model):
    """Returns the Work: the first questions of --data, or random ids.

    Raises ValueError for a file that has fewer questions than --prompts."""
    if args.data:
        tokenizer = prompts.load_tokenizer(args.model)
        return Work(tokenizer, prompts.prompt_texts(common.questions(args), tokenizer, "auto"),
                    common.real_prompts(args, tokenizer), prompts.stop_ids(model, tokenizer))

    drawn, _ = common.workload(args, model.config)
    # no stop or padding inside a prompt
    ids = [[max(13, token) for token in prompt] for prompt in drawn]
    texts = [" ".join(map(word, prompt)) for prompt in ids]
    return Work(word_tokenizer(model.config.vocab_size), texts, ids, STOPS)


def reward(completion_ids, **_):
    """Returns 1 for each completion whose ids add up to an even number, else 0."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def word_tokenizer(vocab_size):
    """Returns a tokenizer of one word an id, so that both sides see the same tokens.

    "w0000005 w0000007" is [5, 7]."""
    ids = {word(i): i for i in range(vocab_size)}
    words = Tokenizer(models.WordLevel(ids, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=word(1), pad_token=word(0),
                                   unk_token=word(0))


def word(i):
    """Returns the word of an id, all of one width: special words are found inside longer ones."""
    return f"w{i:07d}"


# --------------------------------------------------------------------------------------- TRL's side

class Watched(GRPOTrainer):
    """TRL's trainer, which keeps its first batch, and the loss and the weights then."""
    first_batch = None

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.first_batch is None:
            self.first_batch = {name: value for name, value in inputs.items()
                                if torch.is_tensor(value)}
            self.first_loss = loss.item()
            self.first_weights = {name: value.detach().clone()
                                  for name, value in model.state_dict().items()}
        return loss


class Alternate(TrainerCallback):
    """Times each of TRL's steps, and then makes and times one of ours."""

    def __init__(self, our_step):
        self.our_step = our_step
        self.seconds = {"trl": [], "ours": []}
        self.tokens = []                # drawn in each of our steps

    def on_step_begin(self, *args, **kwargs):
        self.begin = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds["trl"].append(time.perf_counter() - self.begin)
        begin = time.perf_counter()
        self.tokens.append(self.our_step())
        self.seconds["ours"].append(time.perf_counter() - begin)


def trainer_of(args, folder, work, config):
    """Returns TRL's trainer of the model in the folder, with the settings of our side."""
    settings = GRPOConfig(
        output_dir=folder + "/trl",

        # the step
        per_device_train_batch_size=args.prompts * args.group_size,
        num_generations=args.group_size,
        max_completion_length=args.new_tokens,
        max_steps=args.rounds + 1,
        shuffle_dataset=False,

        # drawing
        temperature=1.0,
        top_p=1.0,
        top_k=0,

        # the objective
        loss_type="dapo",
        beta=0.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",

        # the machine
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    problems = Dataset.from_dict({"prompt": work.texts * (args.rounds + 1)})
    return Watched(model=folder, reward_funcs=reward, args=settings,
                   processing_class=work.tokenizer, train_dataset=problems,
                   peft_config=peft_adapter(args, config))


def peft_adapter(args, config):
    """Returns PEFT's settings of an adapter such as ours, or None without --lora-rank.

    Raises ValueError where PEFT is not there."""
    if not args.lora_rank:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(f"train --vs trl --lora-rank: this Python has no {error.name}: "
                         "pip install peft") from None
    # "all-linear" leaves the output layer out, as we do
    return LoraConfig(r=args.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=0.0,
                      target_modules="all-linear", bias="none", task_type="CAUSAL_LM")


# ----------------------------------------------------------------------------------- the comparison

def compare(args, device):
    """Returns seconds of a step on both sides, and the ratio of each round.

    The losses and gradient norms of both sides on TRL's first batch stand beside them. Raises
    ValueError on an accelerator."""
    if device.type != "cpu":
        raise ValueError("train --vs trl compares on the CPU: give --device cpu")
    torch.manual_seed(0)
    model = common.model_of(args, device, dist.Sharding(device, torch.float32))
    work = work_of(args, model)
    adapter = {"lora_rank": args.lora_rank} if args.lora_rank else {}
    config = Config(group_size=args.group_size, prompts_per_step=args.prompts, lr=1e-6,
                    micro_batch_tokens=args.micro_batch_tokens, unbiased_std=True, **adapter)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, torch.float32)
        work.tokenizer.save_pretrained(folder)
        write_json(Path(folder) / "generation_config.json", {"eos_token_id": work.stops})
        model = common.adapted(model, args)
        alternate = Alternate(our_steps(args, model, work, config))
        trainer = trainer_of(args, folder, work, config)
        trainer.add_callback(alternate)
        trainer.train()

    log = trainer.state.log_history
    check_prompts(trainer.first_batch, work)
    our_loss, our_norm = on_their_batch(trainer, model.config, config)
    seconds = {side: np.array(values[1:])                   # the first step warms up
               for side, values in alternate.seconds.items()}
    rows = args.prompts * args.group_size
    return {
        "trl": __version__,
        "lora_rank": args.lora_rank,
        "parameters": common.parameter_count(model),
        "mean_length": {
            "ours": float(np.mean(alternate.tokens)) / rows,
            "trl": float(np.mean([line["completions/mean_length"] for line in log[:-1]])),
        },
        "seconds": {side: common.summary(values) for side, values in seconds.items()},
        "ratio": common.summary(seconds["trl"] / seconds["ours"]),
        "same_batch": {
            "loss": {"trl": trainer.first_loss, "ours": our_loss},
            "grad_norm": {"trl": log[0]["grad_norm"], "ours": our_norm},
        },
    }


def our_steps(args, model, work, config):
    """Returns a function that makes one whole step of ours, and returns how many tokens it drew."""
    learner = common.make_learner(model, config)
    sampler = Sampler(model, work.stops, args.prompts * args.group_size)
    seeds = itertools.count(2)

    def step():
        out = sampler.generate(work.ids, args.group_size, args.new_tokens, seed=next(seeds))
        completions = out.completions()
        work.tokenizer.batch_decode(completions)         # TRL does too
        rewards = torch.tensor(reward(completions)).view(-1, args.group_size)

        batch = grpo.prepare(out, rewards, config)
        common.one_step(learner, batch, list(range(len(completions))))
        return sum(map(len, completions))
    return step


def check_prompts(theirs, work):
    """Raises ValueError if TRL has made other ids of the prompts than we have."""
    both = zip(theirs["prompt_ids"], theirs["prompt_mask"])
    seen = {tuple(ids[mask.bool()].tolist()) for ids, mask in both}
    if seen != {tuple(ids) for ids in work.ids}:
        raise ValueError("TRL has made other token ids of these prompts than we have: "
                         "the two would not do the same work")


def our_names(weights):
    """Returns the weights of TRL's model under the names that ours have.

    PEFT's: "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight" and
    "...up_proj.lora_A.default.weight"."""
    renamed = {}
    for name, value in weights.items():
        name = name.removeprefix(lora.PREFIX).replace(".base_layer.", ".")
        renamed[name.replace(".default.weight", "")] = value
    return renamed


def on_their_batch(trainer, model_config, config):
    """Returns our loss and gradient norm on TRL's first batch, with the weights of then.

    TRL has shuffled the rows, so every row is a group of its own."""
    config = replace(config, group_size=1, zero_variance="keep")
    model = Transformer(model_config)
    if config.lora_rank:
        lora.attach(model, config.lora_rank, config.lora_alpha)
    model.load_state_dict(our_names(trainer.first_weights))

    # their prompts are padded on the left and their completions on the right, each to one length
    theirs = trainer.first_batch
    prompts = [ids[mask.bool()] for ids, mask in zip(theirs["prompt_ids"], theirs["prompt_mask"])]
    completions = [ids[mask.bool()] for ids, mask
                   in zip(theirs["completion_ids"], theirs["completion_mask"])]
    rows = [torch.cat(both) for both in zip(prompts, completions)]

    count = len(rows)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)                    # (B, T)
    rollout = Rollout(
        tokens=tokens,
        prompt_lengths=theirs["prompt_mask"].sum(1),
        lengths=theirs["prompt_mask"].sum(1) + theirs["completion_mask"].sum(1),
        logps=torch.zeros(tokens.shape),
        finished=torch.ones(count).bool(),
    )

    # as TRL does it: its advantages, and a ratio of 1 in the first update
    logps, _ = model.token_logps(tokens, rollout.completion_mask())
    batch = grpo.prepare(rollout, torch.zeros(count, 1), config)
    batch = common.replaced(batch, advantages=theirs["advantages"].flatten(),
                            old_logp=logps.detach())
    return common.one_step(common.make_learner(model, config), batch, list(range(count)))
