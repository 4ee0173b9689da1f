"""From a batch to optimizer steps: passes, micro-batches, one normaliser, gradients over ranks.

The gradient is that of the whole batch at once. The loss of every micro-batch is divided by the
same count, taken over all micro-batches and ranks before the first backward. Gradients are *summed*
over ranks (dist.py), not averaged, so any split of the batch gives the same gradient. A rank
without rows has tensors of 0 rows and enters every collective.

A step is one rollout. A pass is all training on one batch: --epochs times through it, in
--minibatches updates each. An update is one call of the optimizer.

An objective is a module (grpo.py, gtpo.py, offpolicy.py; its name stands in config.ALGOS) with

    Settings                                dataclass of its flags. config.py joins it with the
                                            settings that every run has; an optional check() may
                                            read both
    METRICS                                 {name: "tokens" | "rows"}: sums that `loss` returns, and
                                            the count that they are divided by
    prepare(rollout, rewards, config)       -> Batch; pure
    loss(logp, entropy, batch, config, normalizer)      -> (scalar, sums); pure. Among the sums are
                                            those of grpo.common_sums, "tokens" and "rows"

and, where it needs them,

    State(config)                           carried from step to step and saved: state_dict,
                                            load_state_dict
    complete(learner, batch)                adds to the batch what only a model or other ranks know
    forward(model, micro, rows, config)     -> (logp, entropy), if they are not those of token_logps
    learn(learner, rollout, rewards)        -> (updates, more for the log), if a rollout is more
                                            than one batch
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch

import dist
from engine.checkpoint import Progress
from engine.logps import gradients_in_place
from model import trainable
from progress import bar


def adamw(model, lr, weight_decay=0.0, parameters=None):
    """AdamW with its state allocated now: what does not fit is found before the first rollout.

    parameters: those of the model to train; all that receive a gradient if not given. Only matrices
    decay: a norm's weight or a bias has no reason to be near 0."""
    if parameters is None:
        parameters = trainable(model)
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(      # fused: no temporary of a weight's size
        [group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.95), fused=True)
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=dist.local(p).device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


@dataclass
class Learner:
    """All that an optimizer step needs."""
    config: object                      # settings of the run (config.py)
    objective: object                   # a module: grpo, gtpo, offpolicy, ...
    model: torch.nn.Module              # pi
    optimizer: torch.optim.Optimizer
    progress: Progress                  # counts of steps and updates, saved with each checkpoint
    reference: torch.nn.Module = None   # pi_ref, with --beta
    behaviour: torch.nn.Module = None   # mu, with --sync-every; else pi draws
    state: object = None                # the objective's State
    say: object = print                 # takes one line for the user

    @property
    def device(self):
        return self.model.device

    # ------------------------------------------------------------------------- a rollout

    def learn(self, rollout, rewards):
        """Make all optimizer steps of a rollout with rewards (n, G).

        Returns numbers for the log."""
        learn = getattr(self.objective, "learn", one_batch)
        updates, more = learn(self, rollout, rewards)
        return {**self.means(updates), **more}

    def batch(self, rollout, rewards):
        """The batch that the loss reads: what the objective makes of the rollout, completed."""
        batch = self.objective.prepare(rollout, rewards, self.config)
        if hasattr(self.objective, "complete"):
            self.objective.complete(self, batch)
        return batch

    def score_mu(self, batch, version):
        """In bfloat16, put the trainer's log mu in the place of the sampler's; in float32 nothing.

        The two round differently. In float32 that is 1e-6. In bfloat16 it is 0.01 to 0.1 nats a
        token, which, summed over a completion, would look like a policy that has moved.
        version: updates that mu had seen."""
        if self.model.dtype == torch.float32:
            return
        batch.drawn_logp = batch.old_logp
        on_policy = version == self.progress.updates

        if on_policy and self.config.epochs * self.config.minibatches == 1:
            batch.old_logp = None       # its only update meets mu itself: no second forward
        else:
            batch.old_logp = self.score(batch, model=None if on_policy else self.behaviour)[0]

    def make_pass(self, batch, group_count, config=None):
        """Make one pass over a batch. Returns a list of sums, one an update.

        group_count: groups over all ranks, of which the batch holds this rank's share. config:
        settings of the loss, if they are not the run's. Group i goes to minibatch i mod
        --minibatches. i counts over all ranks, so a minibatch is the same on any world size."""
        c = config or self.config
        group_numbers = dist.split(group_count)
        active = batch.active.tolist()
        measure_variance = c.variance_every and self.progress.step % c.variance_every == 0

        def active_rows(minibatch, half=None):
            """Rows of the groups whose number falls to this minibatch, or to this half of it."""
            rows = []
            for local, number in enumerate(group_numbers):
                of_half = number // c.minibatches % 2
                if number % c.minibatches == minibatch and half in (None, of_half):
                    rows += range(local * c.group_size, (local + 1) * c.group_size)
            return [row for row in rows if active[row]]

        updates = []
        for _ in range(c.epochs):
            for minibatch in range(c.minibatches):
                if measure_variance:
                    halves = active_rows(minibatch, 0), active_rows(minibatch, 1)
                    updates.append(self.update_in_halves(batch, *halves, c))
                else:
                    updates.append(self.update(batch, active_rows(minibatch), c))
        return updates

    def means(self, updates):
        """Means over the updates of a rollout.

        Without a trained token "entropy" is left out: the log keeps the estimate from the sampler's
        log-probs (report.rollout_metrics)."""
        count = {unit: sum(u[unit] for u in updates) for unit in ("tokens", "rows")}
        out = {}
        for name, unit in self.objective.METRICS.items():
            out[name] = sum(u[name] for u in updates) / max(count[unit], 1)
        if not count["tokens"]:
            out.pop("entropy", None)

        for name in ("loss", "grad_norm"):
            out[name] = sum(u[name] for u in updates) / len(updates)
        if "grad_variance" in updates[0]:       # nan where one half of a batch was empty
            known = [u["grad_variance"] for u in updates if not math.isnan(u["grad_variance"])]
            out["grad_variance"] = sum(known) / len(known) if known else math.nan

        first = updates[0]          # only there mu may still be pi
        out["ratio_max_dev"] = first["ratio_max_dev"]
        out["ratio_mean_dev"] = first["ratio_mean_dev"] / max(first["tokens"], 1)
        return out

    @torch.no_grad()
    def score(self, batch, rows=None, model=None):
        """Log-probs and entropies of the batch's tokens under a model: two (B, T), 0 off the mask.

        rows: those that are wanted; the active ones if not given. model: the learner's if not
        given."""
        model = model or self.model
        if rows is None:
            rows = batch.active.nonzero()[:, 0].tolist()

        out = torch.zeros(2, *batch.mask.shape, device=batch.mask.device)
        micro_batches = micro_batches_of(batch, rows, self.config)
        for part, micro in bar(micro_batches, "scoring, micro-batches"):
            dist.detail("scoring")
            both = torch.stack(forward(model, micro, part, self.config))    # (2, rows, T of part)
            out[:, part, :both.shape[2]] = both * micro.mask

        dist.reshard(model)
        dist.detail("")
        return out

    # ---------------------------------------------------------------- one optimizer step

    def update(self, batch, rows, config=None):
        """Make one optimizer step on the given rows of this rank's batch.

        Returns sums for the log, already reduced over ranks."""
        c = config or self.config
        normalizer = self.normalizer(batch, rows, c)         # over all ranks, before any backward
        sums = self.no_sums()
        with self.accumulating():
            self.accumulate(batch, rows, c, normalizer, sums)
        return self.finish(sums, normalizer)

    def update_in_halves(self, batch, first, second, config=None):
        """As `update` on both halves together, with "grad_variance" among the sums.

        A diagnostic, every --variance-every steps: how noisy the gradient is."""
        c = config or self.config
        counts = [self.normalizer(batch, rows, c) for rows in (first, second)]
        normalizer = sum(counts)

        sums = self.no_sums()
        with self.accumulating():
            self.accumulate(batch, first, c, normalizer, sums)
            of_first = [torch.zeros_like(p) if p.grad is None else p.grad.clone()
                        for p in trainable(self.model)]
            self.accumulate(batch, second, c, normalizer, sums)

        variance = gradient_variance(trainable(self.model), of_first, counts)
        return {**self.finish(sums, normalizer), "grad_variance": variance}

    def normalizer(self, batch, rows, config):
        """The divisor of the loss: trained tokens of these rows, or the rows, of all ranks."""
        here = float(len(rows))
        if getattr(config, "aggregation", "token") == "token":
            here = float(batch.mask[rows].sum()) if rows else 0.0
        return dist.all_reduce({"count": here}, self.device)["count"]

    def no_sums(self):
        names = ("loss", "tokens", "rows", "ratio_mean_dev", *self.objective.METRICS)
        return {**dict.fromkeys(names, 0.0), "ratio_max_dev": 0.0}

    def accumulating(self):
        """While open, embedding and lm_head add their gradients in place.

        They are the largest tensors of a small model's update. Sharded weights cannot (their
        gradient is reduced by FSDP's hooks), and frozen ones have none."""
        in_place = not dist.sharded(self.model) and self.model.lm_head.weight.requires_grad
        return gradients_in_place(self.model.lm_head.weight) if in_place else nullcontext()

    def accumulate(self, batch, rows, config, normalizer, sums):
        """Add these rows to the model's gradient and to sums, micro-batch by micro-batch."""
        parts = micro_batches_of(batch, rows, config)
        for i, (part, micro) in enumerate(bar(parts, "training, micro-batches")):
            dist.detail(f"micro-batch {i + 1} of {len(parts)}")
            # a switch: only the last backward also sums gradients over copies of the weights
            dist.reduce_over_copies(self.model, now=i == len(parts) - 1)

            found = self.backward(batch, part, micro, config, normalizer)
            dist.give_memory_back(self.model)
            sums["ratio_max_dev"] = max(sums["ratio_max_dev"], found.pop("ratio_max_dev"))
            for name, value in found.items():
                sums[name] += value

    def backward(self, batch, part, micro, config, normalizer):
        """Forward and backward of one micro-batch. Returns its sums; fills batch.pi_logp."""
        logp, entropy = getattr(self.objective, "forward", forward)(self.model, micro, part, config)
        if not part:                # for the other ranks' sake
            logp.sum().backward()
            return {"ratio_max_dev": 0.0}

        if micro.old_logp is None:
            micro.old_logp = logp.detach()
        loss, sums = self.objective.loss(logp, entropy, micro, config, normalizer)
        loss.backward()
        if batch.pi_logp is not None:
            batch.pi_logp[part, :logp.shape[1]] = logp.detach()

        sums = {"loss": loss.detach(), **sums}
        values = torch.stack([value.float() for value in sums.values()])
        return dict(zip(sums, values.tolist()))         # one wait for the device

    def finish(self, sums, normalizer):
        """Reduce the sums over ranks, and step."""
        deviation = {"ratio_max_dev": sums.pop("ratio_max_dev")}
        out = dist.all_reduce(sums, self.device)
        out |= dist.all_reduce(deviation, self.device, "max")

        for p in trainable(self.model):         # without rows there was no backward
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        any_signal = normalizer > 0
        out["grad_norm"] = self.descend(out["loss"]) if any_signal else 0.0
        self.optimizer.zero_grad(set_to_none=True)      # now: the next rollout needs their memory
        return out

    def descend(self, loss):
        """Clip the gradient and step. Returns its norm.

        A non-finite one is skipped and counted. Raises ValueError after five in a row."""
        norm = torch.nn.utils.clip_grad_norm_(trainable(self.model), self.config.grad_clip)
        norm = dist.total(norm)
        progress = self.progress
        if math.isfinite(norm) and math.isfinite(loss):
            progress.bad_steps = 0
            progress.updates += 1
            self.optimizer.step()
            return norm

        progress.bad_steps += 1
        self.say(f"step {progress.step}: loss {loss} and gradient norm {norm}: "
                 f"update skipped ({progress.bad_steps} in a row)")
        if progress.bad_steps >= 5:
            raise ValueError(f"five non-finite updates in a row at step {progress.step}: "
                             "begin another --out with a lower --lr")
        return norm


def one_batch(learner, rollout, rewards):
    """What an objective without a `learn` of its own does with a rollout: one pass."""
    batch = learner.batch(rollout, rewards)
    learner.score_mu(batch, rollout.version)
    return learner.make_pass(batch, learner.config.prompts_per_step), {}


def forward(model, micro, rows, config):
    """Log-probs and entropies of a micro-batch: two (rows, T).

    Rows of one group share their prompt."""
    groups = [row // config.group_size for row in rows]
    return model.token_logps(micro.tokens, micro.mask, config.temperature, groups)


def gradient_variance(parameters, of_first, counts):
    """Variance of the batch gradient (trace of its covariance), estimated from its two halves.

    It is |g_1 - g_2|^2 n_1 n_2 / n^2. The parameters hold the gradient of both halves, of_first
    that of the first; counts are the normalizer's two parts. The same as the two-batch estimator of
    McCandlish et al. (arXiv 1812.06162, appendix A), with both halves averaged. nan where one half
    is empty."""
    if min(counts) == 0:
        return math.nan
    one = sum(counts) / counts[0]
    two = sum(counts) / counts[1]

    squares = 0
    for p, g in zip(parameters, of_first):
        difference = g * one - (p.grad - g) * two
        squares += dist.total(difference.square().sum())
    return squares / (one * two)


# ----------------------------------------------------------------------------------- micro-batches

# Attention copies the keys that it reads. A key is smaller than a token's activations, so a
# micro-batch may read this many keys for each token of its budget.
KEYS_PER_TOKEN = 4


def micro_batches(rows, lengths, prompt_lengths, group_size, budget):
    """Cut rows (indices) into parts of at most `budget` tokens; one row is the least.

    lengths and prompt_lengths are those of every row of the batch; row r is of group r //
    group_size. Groups of like length are together, and a group's prompt counts once a part.
    Attention still reads a prompt's keys for each completion, so a part has at most
    KEYS_PER_TOKEN times the budget of them."""
    longest = {}        # row of each group
    for r in rows:
        longest[r // group_size] = max(lengths[r], longest.get(r // group_size, 0))

    def by_length(r):
        group = r // group_size
        return longest[group], group, lengths[r]

    parts, tokens, keys = [], 0, 0
    for r in sorted(rows, key=by_length):
        shares_prompt = parts and parts[-1][-1] // group_size == r // group_size
        more = lengths[r] - (prompt_lengths[r] if shares_prompt else 0)

        if parts and tokens + more <= budget and keys + lengths[r] <= KEYS_PER_TOKEN * budget:
            parts[-1].append(r)
            tokens += more
            keys += lengths[r]
        else:
            parts.append([r])
            tokens = keys = lengths[r]
    return parts


def micro_batches_of(batch, rows, config):
    """Cut rows of a batch into micro-batches: [(rows, the batch of these rows alone)].

    There are as many on every rank, because each pass through a sharded model is a collective. A
    rank that has fewer ends with parts of no rows."""
    parts = micro_batches(rows, batch.lengths.tolist(), batch.prompt_lengths.tolist(),
                          config.group_size, config.micro_batch_tokens)
    most = dist.all_reduce({"parts": len(parts)}, batch.mask.device, "max")["parts"]
    parts += [[]] * (int(most) - len(parts))
    return [(part, batch.rows(part)) for part in parts]
