"""The museum of defects: published bugs of RL trainers, put into our functions, and the test of ours that sees each.

An exhibit is a short wrong version of one function, `wrong(ours, *arguments)`, where `ours` is the function that it replaces.
It names the thread in which somebody met the bug, and one test of this project, which must pass as the code is and must fail
with the wrong version in place. docs/museum.md is the same list for reading; `PYTHONPATH=. python tests/test_museum.py`
writes its tables.

A thread is repository#number; where the bug was read in a program and no thread is known, the repository alone.
"""
import functools
import importlib
import inspect
import itertools
import math
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.decode import InferenceModel
from engine.sampling import invert_in_two, truncate
from test_chat import base, plain, saved            # fixtures of tests that are shown here
from test_data import tokenizer
from test_train import bfloat16
from test_user_reward import file

HERE = Path(__file__).resolve().parents[1]
EXHIBITS = []


@dataclass
class Exhibit:
    room: str               # kind of bug
    thread: str             # where somebody met it
    place: str              # module.function of ours that would hold it
    test: str               # module.function of the test that sees it
    case: dict              # parameters of that test; {}: all that it has
    raises: type            # what the test fails with
    wrong: object           # the wrong version; its docstring is the defect, and what it did to people

    @property
    def texts(self):
        defect, _, harm = " ".join(self.wrong.__doc__.split()).partition(". ")
        return defect, harm.removesuffix(".")


def exhibit(room, thread, place, test, raises=AssertionError, **case):
    """Hang the function below into a room of the museum."""
    def hang(wrong):
        EXHIBITS.append(Exhibit(room, thread, place, test, case, raises, wrong))
        return wrong
    return hang


# ------------------------------------------------------------------------------------------------ masks and padding

MASKS = "Masks and padding"


@exhibit(MASKS, "theLMbook#16", "rollout.Rollout.completion_mask",
         "test_grpo.test_the_stop_token_is_trained_also_when_it_equals_the_padding")
def mask_from_token_values(ours, rollout):
    """The mask is "token is not pad". Where pad is eos the stop token is not trained, and the model forgets to stop."""
    return ours(rollout) * (rollout.tokens != 0)


@exhibit(MASKS, "nanochat", "rollout.Rollout.completion_mask",
         "test_rollout.test_lengths_mask_and_finished_follow_from_the_tokens", max_new_tokens=8, group_size=4)
def stop_token_left_out(ours, rollout):
    """The stop token ends a sample but is not in it. Stopping is never reinforced."""
    return ours(replace(rollout, lengths=rollout.lengths - 1))


@exhibit(MASKS, "MemGen#33", "rollout.Rollout.completion_mask",
         "test_rollout.test_stop_token_that_is_the_padding_id_is_in_the_mask")
def padding_counts_as_tokens(ours, rollout):
    """What follows the stop token counts. All rows have the length of the longest, and the loss was always exactly 0."""
    return ours(replace(rollout, lengths=torch.full_like(rollout.lengths, rollout.tokens.shape[1])))


@exhibit(MASKS, "trl#2708", "model.Packing._add", "test_model.test_a_row_has_the_same_log_probs_alone_and_in_a_batch")
def no_attention_mask(ours, packing, row, start, stop, before):
    """The trainer's forward has no attention mask. Tokens saw what is not theirs; log-probs depended on the batch."""
    return ours(packing, row, start, stop, np.arange(packing.packed))


@exhibit(MASKS, "trl#6369", "grpo.prepare", "test_grpo.test_masking_truncated_rows_keeps_them_in_the_baseline")
def truncated_rows_in_the_denominator(ours, rollout, rewards, config):
    """Cut rows leave the sum but not the count. The loss was diluted by the tokens that were masked."""
    batch = ours(rollout, rewards, replace(config, mask_truncated=False))
    return replace(batch, advantages=batch.advantages * rollout.finished)


@exhibit(MASKS, "tiny-grpo", "grpo.kl_penalty", "test_grpo.test_off_the_mask_there_is_no_kl")
def kl_of_the_padding(ours, logp, ref_logp, kind="k3", old_logp=None, mask=None):
    """The KL has no mask. Padding, on which both models say anything, is pulled and reported."""
    return ours(logp, ref_logp, kind, old_logp)


# ------------------------------------------------------------------------------------------------------- advantages

ADVANTAGES = "Advantages"


@exhibit(ADVANTAGES, "NeMo-RL#4158", "grpo.group_advantages", "test_grpo.test_equal_rewards_give_exactly_zero",
         scale="std", G=7)
def std_of_equal_numbers(ours, rewards, scale="std", eps=1e-6, unbiased=False):
    """Only a std of exactly 0 is caught. Rounding noise of equal rewards was divided by itself, and advantages spiked."""
    r = rewards.float()
    std = (r.square().mean(1, keepdim=True) - r.mean(1, keepdim=True).square()).clamp(min=0).sqrt()
    return torch.where(std > 0, (r - r.mean(1, keepdim=True)) / std, 0.0)


@exhibit(ADVANTAGES, "OpenRLHF#1272", "grpo.informative",
         "test_grpo.test_groups_of_equal_rewards_leave_loss_and_normaliser_exactly")
def mean_as_pass_rate(ours, rewards):
    """A group is kept when its mean is between 0 and 1. With continuous rewards groups without a signal are kept."""
    return (rewards.mean(1) > 0) & (rewards.mean(1) < 1)


@exhibit(ADVANTAGES, "verl-recipe#125", "refill.enough",
         "test_refill.test_informative_is_what_differs_in_correctness_not_in_the_shaped_reward")
def filter_on_the_shaped_reward(ours, drawn, wanted):
    """Groups are filtered by the shaped reward. All-wrong groups stayed and competed in form: collapse."""
    return ours([replace(d, parts={"correct": d.rewards}) for d in drawn], wanted)


@exhibit(ADVANTAGES, "Search-R1#88", "grpo.group_advantages", "test_grpo.test_two_right_two_wrong")
def every_sample_its_own_group(ours, rewards, scale="std", eps=1e-6, unbiased=False):
    """The samples of a prompt do not share an id. Nothing is compared: the reward is the advantage."""
    return rewards.float()


@exhibit(ADVANTAGES, "GRPO-Zero", "grpo.prepare", "test_grpo.test_two_groups_of_one_prompt_stay_two")
def groups_by_prompt_text(ours, rollout, rewards, config):
    """Groups are found by their prompt's text. A prompt that comes twice in a batch has one baseline for both groups."""
    batch = ours(rollout, rewards, config)
    keys = [tuple(row[:n]) for row, n in zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist())]
    for key in set(keys):
        rows = torch.tensor([key == other for other in keys])
        r = batch.rewards[rows]
        batch.advantages[rows] = (r - r.mean()) / (r.std(correction=0) + 1e-6)
    return batch


# --------------------------------------------------------------------------------------------------- ratio and clip

RATIO = "Ratio and clip"


@exhibit(RATIO, "AReno", "grpo.policy_ratio",
         "test_grpo.test_the_clip_removes_the_gradient_only_where_the_policy_already_moved_that_way")
def ratio_to_itself(ours, logp, old_logp, mask, level="token"):
    """The ratio is exp(logp - logp.detach()). It is always 1, so the clip is decoration (also minimind#775, time-r1#20)."""
    return ours(logp, logp.detach(), mask, level)


@exhibit(RATIO, "mlx-lm-lora#55", "grpo.policy_ratio",
         "test_grpo.test_on_policy_the_loss_is_minus_mean_advantage_and_the_gradient_is_reinforce")
def ratio_without_gradient(ours, logp, old_logp, mask, level="token"):
    """The ratio has no gradient. Rewards and loss look alive, and the adapter stays at its first value."""
    return ours(logp.detach(), old_logp, mask, level) + 0 * logp.nan_to_num()


@exhibit(RATIO, "trl#5815", "grpo.policy_ratio",
         "test_grpo.test_sequence_ratio_is_the_geometric_mean_and_its_gradient_is_constant_in_a_row")
def sequence_ratio_by_sum(ours, logp, old_logp, mask, level="token"):
    """The sequence ratio sums log-ratios in place of their mean. It drifts with length: mean 0.57 where 0.99 was right."""
    log_ratio = torch.where(mask.bool(), logp - old_logp, 0.0).sum(1, keepdim=True)
    return log_ratio.exp().expand_as(logp)


@exhibit(RATIO, "GTPO's official code", "gtpo.policy_loss", "test_gtpo.test_the_gradient_by_hand")
def ratio_of_one_in_later_updates(ours, logp, old_logp, *arguments):
    """The ratio is 1 in every update. From the second update on, samples of another policy are not corrected."""
    return ours(logp, None, *arguments)


@exhibit(RATIO, "torchforge#664", "grpo.masked_log_ratio", "test_grpo.test_huge_ratios_stay_finite")
def log_ratio_without_bounds(ours, logp, other, mask):
    """The log-ratio has no bounds. One token overflows exp; a KL of 6.8e9 was logged."""
    return torch.where(mask.bool(), logp - other, 0.0)


@exhibit(RATIO, "trl#6945", "learner.Learner.score_mu", "test_mu.test_the_gradient_is_that_of_the_trainers_own_mu",
         settings={})
def the_samplers_rounding_as_drift(ours, learner, batch, version):
    """The sampler's log-probs stand for the trainer's. Rounding counts as a policy that has moved, and is clipped."""
    batch.drawn_logp = batch.old_logp


@exhibit(RATIO, "Agent-R1#30", "learner.Learner.descend",
         "test_learner.test_a_loss_or_a_gradient_that_alone_is_not_finite_makes_no_step")
def step_into_nan(ours, learner, loss):
    """A step is made whatever the norm. After one bad loss every metric was NaN and every reward the worst."""
    norm = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), learner.config.grad_clip).item()
    learner.optimizer.step()
    return norm


# -------------------------------------------------------------------------------------------------------- averaging

AVERAGING = "Averaging"


@exhibit(AVERAGING, "transformers#34242", "grpo.aggregate",
         "test_grpo.test_the_token_budget_does_not_change_the_gradient", aggregation="token")
def mean_of_each_micro_batch(ours, loss, mask, how="token", normalizer=None, max_length=None):
    """Each micro-batch is divided by its own tokens. The gradient depends on how the batch is cut (also in nanochat)."""
    return ours(loss, mask, how, None, max_length)


@exhibit(AVERAGING, "prime-rl#2359", "learner.Learner.normalizer", "test_learner.test_the_divisor_counts_the_rows_of_all_ranks")
def count_of_this_rank(ours, learner, batch, rows, config):
    """Each rank divides by its own tokens. Tokens on ranks with short completions weighed more (also in nano-aha)."""
    return float(batch.mask[rows].sum())


@exhibit(AVERAGING, "trl#3138", "grpo.aggregate", "test_grpo.test_three_aggregations_by_hand")
def dr_grpo_by_own_length(ours, loss, mask, how="token", normalizer=None, max_length=None):
    """The constant of Dr GRPO is each row's own length. Long wrong answers were punished less a token, and grew."""
    return ours(loss, mask, "sequence" if how == "constant" and max_length else how, normalizer, max_length)


# --------------------------------------------------------------------------------------------------------------- KL

KL = "KL"


@exhibit(KL, "rlhf-book#525", "grpo.kl_penalty", "test_grpo.test_k3_is_never_negative_however_small_the_difference")
def k3_by_exp(ours, logp, ref_logp, kind="k3", old_logp=None, mask=None):
    """k3 is exp(d) - d - 1. For small d the 1 cancels: a KL that cannot be negative was."""
    d = ref_logp - logp
    return d.exp() - d - 1


@exhibit(KL, "trl#4159", "learner.forward", "test_learner.test_the_reference_is_scored_at_the_temperature_of_the_run")
def scored_at_temperature_one(ours, model, micro, rows, config):
    """Tokens are drawn at one temperature and scored at 1. Ratio and KL say "moved" at step 0 (also minimind)."""
    return ours(model, micro, rows, replace(config, temperature=1.0))


# --------------------------------------------------------------------------------------------- sampling and log-probs

SAMPLING = "Sampling and log-probs"


@exhibit(SAMPLING, "trl#6789", "engine.sampling.draw",
         "test_sampling.test_recorded_log_probs_are_those_of_the_truncated_distribution")
def log_probs_before_truncation(ours, logits, uniforms, temperature, top_k=0, top_p=1.0):
    """Tokens come from top-k or top-p, their log-probs from the whole softmax. The ratio is biased (also nanochat)."""
    ids = invert_in_two(truncate(logits, top_k, top_p).softmax(-1), uniforms)
    return ids, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


@exhibit(SAMPLING, "verl#7495", "lora.Adapted.inference_weight", "test_lora.test_the_sampler_draws_by_base_and_adapter",
         dtype=torch.float32)
def adapter_never_delivered(ours, layer):
    """The sampler gets the base weights only. It drew from the first policy, which for two months looked like staleness."""
    return layer.weight


OLD_WEIGHTS = {}


@exhibit(SAMPLING, "trl#5312", "rollout.Sampler.loaded", "test_lora.test_the_sampler_draws_by_base_and_adapter",
         dtype=torch.float32)
@contextmanager
def weights_of_the_first_call(ours, sampler):
    """The sampler keeps the weights of an earlier call. Rollouts came from stale weights; mean importance ratio 0.019."""
    sampler.weights = OLD_WEIGHTS.setdefault(sampler, InferenceModel(sampler.model, sampler.max_rows))
    yield
    sampler.weights = None


@exhibit(SAMPLING, "open-r1#704", "rollout.check_finite", "test_rollout.test_weights_that_are_not_finite_are_one_line",
         name="model.norm.weight", value=math.inf, temperature=1.0)
def nan_is_drawn_from(ours, slots):
    """Nobody looks at the log-probs that were drawn. NaN weights wrote "!!!!!" for the rest of the run."""
    return True


@exhibit(SAMPLING, "unsloth#5230", "engine.logps._ChunkedLogps.backward",
         "test_kernels.test_gradient_of_the_log_prob_by_hand")
def fused_loss_without_gradient(ours, *arguments):
    """The fused head gives zero gradients. The run logs a loss and learns nothing."""
    return tuple(None if g is None else 0 * g for g in ours(*arguments))


@exhibit(SAMPLING, "trl#3678", "engine.logps.logit_chunk",
         "test_model.test_no_tensor_of_batch_times_length_times_vocabulary_is_made")
def all_logits_at_once(ours, kind):
    """All logits exist at once. A 0.6B model ran out of 20 GB."""
    return 2 ** 40


@exhibit(SAMPLING, "nanochat", "evaluate.pass_at_k", "test_evaluate.test_pass_at_k_worked_numbers")
def pass_at_k_of_a_rate(ours, n, c, k):
    """pass@k is not taken over all subsets of the samples. Noisy (the first k of n) or biased (1 - (1 - c/n)^k)."""
    return 1 - (1 - c / n) ** k


# ---------------------------------------------------------------------------------------- tokenisation and templates

TEMPLATES = "Tokenisation and templates"


@exhibit(TEMPLATES, "Qwen3#927", "prompts.stop_ids", "test_data.test_the_stop_set_is_the_union_of_all_sources")
def one_stop_token(ours, model, tokenizer):
    """Only the tokenizer's eos stops. The token that the model ends with is another one, so it writes on to the limit."""
    return [tokenizer.eos_token_id]


@exhibit(TEMPLATES, "trl#6044", "prompts.turn_ends", "test_chat.test_what_follows_an_answer_ends_a_turn")
def eos_ends_every_template(ours, tokenizer):
    """A turn is taken to end with eos. GLM's template has none in it, so completions never ended."""
    return [tokenizer.eos_token_id] if ours(tokenizer) else []


@exhibit(TEMPLATES, "trl#3299", "prompts.end_id", "test_chat.test_sft_teaches_the_end_of_the_turn_in_use")
def sft_teaches_the_base_eos(ours, tokenizer, template):
    """SFT in a chat template teaches the base model's eos. The model wrote on behind its turns (also trl#2059)."""
    return ours(tokenizer, "plain")


@exhibit(TEMPLATES, "transformers#45127", "prompts.speaks_chat",
         "test_chat.test_a_chat_model_whose_tokenizer_kept_the_base_eos_gets_its_chat_template")
def only_the_tokenizer_is_asked(ours, tokenizer):
    """A chat model whose tokenizer kept the base eos is taken for a base model. It is trained on prompts it never saw."""
    return tokenizer.eos_token in (tokenizer.chat_template or "")


@exhibit(TEMPLATES, "trl#2897", "prompts.decode", "test_chat.test_the_stop_token_is_taken_away_and_nothing_else")
def special_tokens_skipped(ours, tokenizer, completions, stops):
    """Special tokens are stripped before the reward. `<answer>` was one, so every reward was 0 (also verl#1724)."""
    return tokenizer.batch_decode(completions, skip_special_tokens=True)


@exhibit(TEMPLATES, "trl#5144", "rollout.draw_groups",
         "test_rollout.test_completions_are_drawn_once_and_decoded_by_problem")
def text_is_tokenized_again(ours, *arguments, **options):
    """Completions are decoded and tokenized again. Trained ids are not those drawn (also SkyRL#123, cs336-a5#15)."""
    rollout, groups = ours(*arguments, **options)
    for row, text in enumerate(sum(groups, [])):
        ids = [ord(letter) - 97 for letter in text]
        start = rollout.prompt_lengths[row]
        rollout.tokens[row, start:] = 0
        rollout.tokens[row, start:start + len(ids)] = torch.tensor(ids)
    return rollout, groups


@exhibit(TEMPLATES, "trl#4311", "prompts.chat_options", "test_chat.test_thinking_is_switched_off")
def template_options_dropped(ours, tokenizer):
    """The chat template's options do not reach it. Thinking could not be switched off (also OpenRLHF#1073)."""
    return {}


# -------------------------------------------------------------------------------------------- rewards and verifiers

REWARDS = "Rewards and verifiers"


@exhibit(REWARDS, "verl#5635", "reward.verify", "test_reward.test_verify_is_the_same_off_the_main_thread")
def alarm_in_a_thread(ours, completion, answer, lenient=False):
    """A timeout by signal, inside "except: 0". Off the main thread it raises, so all MATH rewards were silently 0."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    except ValueError:
        return False
    return ours(completion, answer, lenient)


@exhibit(REWARDS, "GTPO's official code", "reward.equal", "test_reward.test_a_box_that_only_contains_the_answer_is_wrong")
def substring_is_right(ours, given, gold):
    """An answer is right if it contains the gold one. "5 or 6" is paid for 5, and for 6."""
    return gold in given


@exhibit(REWARDS, "verl#2150", "reward.verify", "test_reward.test_several_candidates_or_no_mark_are_wrong")
def last_number_is_the_answer(ours, completion, answer, lenient=False):
    """The last number is the answer ("flexible"). Numbers without a claim are paid; each extractor has its own accuracy."""
    return ours(completion, answer, lenient=True)


@exhibit(REWARDS, "lighteval#869", "thoughts.after_thought",
         "test_reward.test_what_is_inside_a_thought_is_not_the_answer")
def thoughts_are_graded(ours, text):
    """The thought is graded like the answer. Guesses in it, and thoughts that were cut, are paid (also trl#4563)."""
    return text


@exhibit(REWARDS, "verl#7274", "thoughts.tail", "test_reward.test_no_more_is_read_than_the_caps_allow")
def last_300_characters(ours, completion):
    """Only the last 300 characters are searched. A right answer with a long sentence behind it is wrong."""
    return ours(completion)[-300:]


@exhibit(REWARDS, "Math-Verify#14", "reward.equal", "test_reward.test_ratios_are_equal_up_to_a_factor_and_no_divisions")
def colon_is_division(ours, given, gold):
    """":" is read as division. 1:3:2 is paid for 1:2:3, and 2:4:6 is not."""
    return ours(given.replace(":", "/"), gold.replace(":", "/"))


@exhibit(REWARDS, "trl#5026", "reward._same_choice", "test_reward.test_of_a_gold_letter_with_its_value_either_is_right")
def letter_with_value_equals_nothing(ours, given, gold):
    r"""Gold answers such as `\textbf{(C)}\ 12` equal nothing. Their problems taught that every answer is wrong."""
    return False


@exhibit(REWARDS, "ms-swift#8123", "reward.total", "test_user_reward.test_the_rewards_are_the_weighted_sum_by_hand")
def none_becomes_nan(ours, functions, parts):
    """A reward of None becomes NaN. The batch's advantages were NaN; the run ended normally and had learned nothing."""
    return sum(weight * parts[name] for name, weight, _ in functions)


@exhibit(REWARDS, "prime-rl#3376", "reward.overlong",
         "test_user_reward.test_the_punishment_of_long_completions_by_hand")
def everyone_pays_for_length(ours, lengths, finished, correct, limit, buffer):
    """Wrong completions pay for their length too. Among failures the shortest wins: "fail fast"."""
    return ours(lengths, finished, torch.ones_like(correct), limit, buffer)


# ------------------------------------------------------------------------------------------------------- off-policy

OFF_POLICY = "Off-policy"


@exhibit(OFF_POLICY, "tinker-cookbook#822", "offpolicy.importance_weights",
         "test_offpolicy.test_every_scheme_at_every_level_by_hand", scheme="truncated")
def weights_without_a_cap(ours, log_ratio, mask, scheme="none", *arguments, **options):
    """Importance weights have no cap. At a lag of 3 the run became unstable, where the clipped one did not."""
    return ours(log_ratio, mask, "standard", *arguments, **options)


@exhibit(OFF_POLICY, "trl#6804", "replay.pack",
         "test_offpolicy.test_unpack_gives_back_what_was_packed_and_nbytes_is_the_sum")
def only_the_first_group(ours, rollout, rewards, vocab_size, *arguments):
    """Flat tensors reach a buffer that expects groups. Only group 0 was ever stored; its tests used another shape."""
    return ours(rollout, rewards, vocab_size, *arguments)[:1]


@exhibit(OFF_POLICY, "NeMo-RL#2651", "replay.ReplayBuffer.state_dict",
         "test_offpolicy.test_a_saved_buffer_is_the_same_bit_for_bit_and_draws_the_same")
def buffer_not_saved(ours, buffer):
    """The buffer is not in the checkpoint. A resumed run draws from another distribution."""
    groups, buffer.groups = buffer.groups, []
    state = ours(buffer)
    buffer.groups = groups
    return state


# ------------------------------------------------------------------------------------------------------ distributed

DISTRIBUTED = "Distributed"


@exhibit(DISTRIBUTED, "nanochat", "dist.split", "test_dist.test_ranks_share_in_order_and_alike_and_rank_0_has_the_most")
def equal_shares_only(ours, count):
    """Every rank has the same number of prompts. 16 prompts on 20 chips are refused, or the rest is lost."""
    dist = sys.modules["dist"]
    share = count // dist.world()
    return range(share * dist.rank(), share * (dist.rank() + 1))


@exhibit(DISTRIBUTED, "verl#5228", "learner.micro_batches_of", "test_learner.test_a_rank_with_less_to_do_has_as_many_micro_batches")
def micro_batches_of_this_rank(ours, batch, rows, config):
    """After filtering, ranks have unequal numbers of micro-batches. One waits in a collective for ever."""
    return [(part, micro) for part, micro in ours(batch, rows, config) if part]


@exhibit(DISTRIBUTED, "AReaL#1292", "learner.adamw",
         "test_train.test_a_learning_rate_of_1e_6_changes_bfloat16_training")
def weights_without_masters(ours, model, lr, *arguments):
    """Weights and optimizer are bfloat16. Updates of a small learning rate are rounded away (also GRPO-Zero)."""
    optimizer = ours(model, lr, *arguments)
    step = optimizer.step

    def rounded(make=lambda: None):
        make()
        for p in model.parameters():
            p.data.copy_(p.data.bfloat16())
    rounded()
    optimizer.step = lambda: rounded(step)
    return optimizer


# ------------------------------------------------------------------------------------------- checkpoints and resume

RESUME = "Checkpoints and resume"


@exhibit(RESUME, "open-instruct#1523", "data.Stream.__init__",
         "test_data.test_every_epoch_is_a_permutation_and_the_cursor_resumes_it")
def stream_begins_anew(ours, stream, problems, seed, cursor=0):
    """The place in the data is not restored. A resumed run trains on what it has seen."""
    ours(stream, problems, seed)


@exhibit(RESUME, "NeMo-RL#3599", "data.Stream.__init__",
         "test_data.test_every_epoch_is_a_permutation_and_the_cursor_resumes_it")
def cursor_runs_ahead(ours, stream, problems, seed, cursor=0):
    """The saved cursor is that of the loader, which is ahead. Each restart skipped what was in flight: 30 % of one run."""
    ours(stream, problems, seed, cursor + 1 if cursor else 0)


@exhibit(RESUME, "verl#7401", "data.Stream.next",
         "test_data.test_every_epoch_is_a_permutation_and_the_cursor_resumes_it")
def boundary_of_an_epoch(ours, stream, count, progress=0.0):
    """At the boundary of an epoch the loader resumes as exhausted. The next epoch is skipped, and the exit status is 0."""
    at_boundary = stream.cursor and stream.cursor % len(stream.problems) == 0
    if at_boundary and stream._epoch is None:
        stream.cursor += len(stream.problems)
    return ours(stream, count, progress)


@exhibit(RESUME, "nano-aha", "engine.checkpoint.tensors_of",
         "test_dist.test_a_checkpoint_holds_the_moments_of_every_weight")
def optimizer_not_saved(ours, model, optimizer, lagging=None):
    """The optimizer is not in the checkpoint. The first steps after a restart are those of a new Adam."""
    return {name: tensor for name, tensor in ours(model, optimizer, lagging).items() if not name.startswith("exp_avg")}


# ------------------------------------------------------------------------------------------------- SFT and distillation

DISTILL = "SFT and distillation"


@exhibit(DISTILL, "torchtitan#2206", "sft.loss",
         "test_data.test_a_token_weighs_the_same_in_a_batch_of_terse_solutions")
def tokens_of_this_batch(ours, logp, entropy, batch, config, normalizer):
    """Each batch is divided by its own valid tokens. A token in a batch with few of them weighed more."""
    total, sums = ours(logp, entropy, batch, config, normalizer)
    return total * config.batch_tokens / batch.mask.sum(), sums


@exhibit(DISTILL, "atropos#456", "distill.divergence", "test_distill.test_the_gradients_of_both_kls_are_the_known_ones")
def teacher_is_not_heard(ours, student, teacher, beta=1.0):
    """The teacher's data are collected and not used. Distillation cost a teacher's time and gave no gradient."""
    return ours(student.detach(), teacher, beta) + 0 * student.sum(-1)


@exhibit(DISTILL, "verl#5041", "distill.divergence", "test_distill.test_divergences_by_hand")
def reverse_kl_of_the_top_k(ours, student, teacher, beta=1.0):
    """The reverse KL is summed over the top k only. Mass leaves them unseen, and the student becomes unstable."""
    top = student.log_softmax(-1).topk(1)
    return (top.values.exp() * (top.values - teacher.log_softmax(-1).gather(-1, top.indices))).sum(-1)


# ---------------------------------------------------------------------------------------------- the guards of the museum

def find(place):
    """(owner, name) of a function: `module.function` or `module.Class.function`."""
    parts = place.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:-1]:
            owner = getattr(owner, part)
        assert hasattr(owner, parts[-1]), f"{place} does not exist"
        return owner, parts[-1]
    raise AssertionError(f"{place} does not exist")


def function_of(test):
    owner, name = find(test)
    return getattr(owner, name)


def cases_of(test, wanted):
    """All arguments that pytest would give to the test by its parametrize marks, of which `wanted` are kept."""
    axes = []
    for mark in getattr(function_of(test), "pytestmark", []):
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")]
            rows = [(row,) if len(names) == 1 else row for row in mark.args[1]]
            axes.append([dict(zip(names, row)) for row in rows])

    cases = []
    for chosen in itertools.product(*axes):
        case = {name: value for part in chosen for name, value in part.items()}
        if all(case[name] is value or case[name] == value for name, value in wanted.items()):
            cases.append(case)
    assert cases, f"{test} has no case {wanted}"
    return cases


def runner_of(test, wanted, request, tmp_path):
    """Returns a function that runs our test once a case, with the fixtures that it names."""
    function = function_of(test)
    cases = cases_of(test, wanted)
    parameters = inspect.signature(function).parameters
    own = {"monkeypatch", "tmp_path", *cases[0]}
    fixtures = {name: request.getfixturevalue(name) for name in parameters if name not in own}

    def run():
        for number, case in enumerate(cases):
            given = {**fixtures, **case}
            if "tmp_path" in parameters:
                given["tmp_path"] = tmp_path / f"case{number}"
                given["tmp_path"].mkdir()
            with pytest.MonkeyPatch.context() as patch:
                function(**given, **{"monkeypatch": patch} if "monkeypatch" in parameters else {})
    return run


@contextmanager
def in_place(one):
    """While open, the wrong version stands wherever our modules, tests included, hold the function; yields its calls."""
    owner, name = find(one.place)
    stored = inspect.getattr_static(owner, name)
    ours = stored.__func__ if isinstance(stored, staticmethod) else stored
    calls = []

    @functools.wraps(ours)
    def called(*arguments, **options):
        calls.append(None)
        return one.wrong(ours, *arguments, **options)

    holders = [(owner, name)]
    for module in list(sys.modules.values()):
        if str(getattr(module, "__file__", None) or "").startswith(str(HERE)):
            for other, value in vars(module).items():
                if value is ours and (module, other) != (owner, name):
                    holders.append((module, other))
                if isinstance(value, tuple) and ours in value:                  # a table of functions
                    holders.append((module, other))
    with pytest.MonkeyPatch.context() as patch:
        for holder, other in holders:
            value = inspect.getattr_static(holder, other)
            if isinstance(value, tuple):
                patch.setattr(holder, other, tuple(called if x is ours else x for x in value))
            else:
                patch.setattr(holder, other, staticmethod(called) if isinstance(stored, staticmethod) else called)
        yield calls


SHOWN = [pytest.param(one, id=one.wrong.__name__) for one in EXHIBITS]
TESTS = {(one.test, repr(one.case)): one for one in EXHIBITS}


@pytest.mark.parametrize("one", [pytest.param(one, id=one.test) for one in TESTS.values()])
def test_the_test_passes_without_the_defect(one, request, tmp_path):
    runner_of(one.test, one.case, request, tmp_path)()


@pytest.mark.parametrize("one", SHOWN)
def test_the_defect_is_caught(one, request, tmp_path):
    run = runner_of(one.test, one.case, request, tmp_path)
    with in_place(one) as calls:
        try:
            run()
        except (one.raises, pytest.fail.Exception):
            caught = True
        else:
            caught = False
    assert calls, f"{one.test} does not reach {one.place}"
    assert caught, f"{one.test} passes with {one.wrong.__name__}"


# ------------------------------------------------------------------------------------------------------------ the list

def table():
    """The exhibits as the tables of docs/museum.md."""
    lines = []
    for room, shown in itertools.groupby(EXHIBITS, lambda one: one.room):
        lines += ["", f"## {room}", "", "| defect | seen in | what it did | would sit in | caught by |", "|---|---|---|---|---|"]
        for one in shown:
            defect, harm = one.texts
            name = one.test.replace(".test_", ".")
            lines.append(f"| {defect} | {one.thread} | {harm} | `{one.place}` | `{name}` |")
    return "\n".join(lines).strip() + "\n"


def test_the_page_is_this_list():
    assert table() in (HERE / "docs" / "museum.md").read_text()
    assert len(EXHIBITS) >= 40 and len({one.wrong.__name__ for one in EXHIBITS}) == len(EXHIBITS)
    for one in EXHIBITS:
        assert all(one.texts) and len(inspect.getsource(one.wrong).splitlines()) <= 16


if __name__ == "__main__":
    print(table(), end="")
