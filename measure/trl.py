"""`bench.py train --vs trl`: a whole GRPO step of this repository and of TRL's GRPOTrainer, in turns, in one process.

Both start from the same weights and have the same prompts, group size, limits, stop tokens, reward function, objective
(TRL's "dapo": all tokens averaged, no KL), learning rate, clipping and threads, in float32 on the CPU, without activation
checkpointing. A step is everything from prompts to new weights: drawing, decoding, rewards, loss, optimizer. That the
losses are the same is checked on TRL's own first batch: our loss and gradient norm on it stand beside TRL's in the result.
Not in bench.py because TRL is needed to import it.
"""
import tempfile
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, __version__

import dist
import grpo
from config import Config
from model import Transformer
from rollout import Rollout, Sampler
from learner import update
from measure import common

STOPS = list(range(1, 13))      # 12 of 512 ids: random weights stop after 33 of at most 64 tokens in the mean


def reward(completion_ids, **_):
    """1 for completions whose ids add up to an even number, else 0."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def word_tokenizer(vocab_size):
    """One word an id, so that both see the same tokens: "w0005 w0007" is [5, 7]."""
    words = Tokenizer(models.WordLevel({word(i): i for i in range(vocab_size)}, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=word(1), pad_token=word(0), unk_token=word(0))


def word(i):
    """Of one width: a special word is also found inside longer ones."""
    return f"w{i:07d}"


class Watched(GRPOTrainer):
    """TRL's trainer, with its first batch kept."""
    first = None

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.first is None:
            weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
            self.first = {k: v for k, v in inputs.items() if torch.is_tensor(v)}, loss.item(), weights
        return loss


class Alternate(TrainerCallback):
    """Times each of TRL's steps, and runs one of ours after it."""

    def __init__(self, ours):
        self.ours, self.seconds, self.tokens = ours, {"trl": [], "ours": []}, []

    def on_step_begin(self, *args, **kwargs):
        self.begin = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds["trl"].append(time.perf_counter() - self.begin)
        begin = time.perf_counter()
        self.tokens.append(self.ours())
        self.seconds["ours"].append(time.perf_counter() - begin)


def same_batch(first, config):
    """Our loss and gradient norm on TRL's batch and weights. TRL has shuffled the rows: every row is a group of its own."""
    (inputs, _, weights), c = first, replace(config.run, group_size=1, zero_variance="keep")
    model = Transformer(config.model)
    model.load_state_dict(weights)
    prompts, completions = inputs["prompt_mask"].sum(1), inputs["completion_mask"].sum(1)
    rows = [torch.cat((p[m.bool()], c[n.bool()])) for p, m, c, n in zip(
        inputs["prompt_ids"], inputs["prompt_mask"], inputs["completion_ids"], inputs["completion_mask"])]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    rollout = Rollout(tokens, prompts, prompts + completions, torch.zeros(tokens.shape), torch.ones(len(rows)).bool())
    batch = grpo.prepare(rollout, torch.zeros(len(rows), 1), c)
    batch["advantages"] = inputs["advantages"].flatten()
    batch["old_logp"] = model.token_logps(tokens, batch["mask"])[0].detach()       # as TRL: the ratio of a first update is 1
    return update(common.make_run(model, c), batch, [list(range(len(rows)))], c)


def compare(args, device):
    """Seconds of a step, ratio of each round, and the two losses and gradient norms on the same batch."""
    common.SHAPES[args.shape] = {**common.SHAPES[args.shape], "eos_token_id": STOPS}
    torch.manual_seed(0)
    model = common.random_model(args, device, dist.Sharding(device, torch.float32))
    tokenizer, (prompts, _) = word_tokenizer(model.config.vocab_size), common.workload(args, model.config)
    prompts = [[max(13, t) for t in p] for p in prompts]        # no stop or padding inside a prompt
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, torch.float32)
        tokenizer.save_pretrained(folder)
        run = common.make_run(model, Config(group_size=args.group_size, prompts_per_step=args.prompts, lr=1e-6,
                                           micro_batch_tokens=args.micro_batch_tokens, unbiased_std=True))
        sampler = Sampler(model, STOPS, args.prompts * args.group_size)

        def ours():
            run.step += 1
            out = sampler.generate(prompts, args.group_size, args.new_tokens, seed=run.step)
            completions = out.completions()
            tokenizer.batch_decode(completions)         # TRL does too
            rewards = torch.tensor(reward(completions)).view(-1, args.group_size)
            update(run, grpo.prepare(out, rewards, run.c), [list(range(len(completions)))], run.c)
            return sum(map(len, completions))

        settings = GRPOConfig(
            output_dir=folder + "/trl", per_device_train_batch_size=args.prompts * args.group_size, loss_type="dapo",
            beta=0.0, num_generations=args.group_size, max_completion_length=args.new_tokens, max_steps=args.rounds + 1,
            temperature=1.0, top_p=1.0, top_k=0, learning_rate=1e-6, lr_scheduler_type="constant", gradient_checkpointing=False, bf16=False,
            use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, shuffle_dataset=False)
        trainer = Watched(model=folder, reward_funcs=reward, args=settings, processing_class=tokenizer, train_dataset=Dataset.
                          from_dict({"prompt": [" ".join(map(word, p)) for p in prompts] * (args.rounds + 1)}))
        watch = Alternate(ours)
        trainer.add_callback(watch)
        trainer.train()
        log = trainer.state.log_history
    one = same_batch(trainer.first, SimpleNamespace(model=model.config, run=run.c))
    seconds = {name: values[1:] for name, values in watch.seconds.items()}     # the first warms up
    return {"trl": __version__, "parameters": sum(p.numel() for p in model.parameters()),
            "mean_length": {"ours": float(np.mean(watch.tokens)) / (args.prompts * args.group_size),
                            "trl": float(np.mean([x["completions/mean_length"] for x in log[:-1]]))},
            "seconds": {name: common.summary(s) for name, s in seconds.items()},
            "ratio": common.summary(np.array(seconds["trl"]) / np.array(seconds["ours"])),
            "same_batch": {"loss": {"trl": trainer.first[1], "ours": one["loss"]},
                           "grad_norm": {"trl": log[0]["grad_norm"], "ours": one["grad_norm"]}}}
