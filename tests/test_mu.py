"""mu is the trainer's own evaluation of the policy that drew: what rounds is not taken for a policy that has moved.

The sampler and the trainer round differently. In bfloat16 that is 0.01 to 0.1 nats a token; the loss must not see it."""
import itertools

import pytest
import torch

import grpo
import learner as learning
import offpolicy
from config import Config, objective
from engine.checkpoint import Progress
from model import ModelConfig, Transformer
from rollout import Sampler

torch.set_num_threads(1)
REWARDS = torch.tensor([[1.0, 0] * 4, [0, 0, 1, 0, 1, 1, 0, 0]])
LONG = 32


def model_of(dtype=torch.bfloat16, seed=0):
    config = ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=.12,
                         tie_word_embeddings=False)
    model = Transformer(config).init_weights(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)        # sharper, so that rounding shows
    return model.to(dtype)


def learner_of(model, algo="grpo", lr=1e-12, **settings):
    """A learner whose steps move nothing, because bfloat16 has no room for so small a change."""
    c = Config(algo=algo, group_size=8, prompts_per_step=2, max_new_tokens=LONG, micro_batch_tokens=300, **settings)
    module = objective(algo)
    state = module.State(c) if hasattr(module, "State") else None
    return learning.Learner(c, module, model, learning.adamw(model, lr), Progress(step=1), state=state)


def drawn(model, version=0):
    out = Sampler(model, []).generate([[1, 2, 3, 4], [5, 6]], 8, [LONG, LONG - 9] * 8, seed=3)
    out.version = version
    return out


def test_the_sampler_and_the_trainer_do_round_differently():
    """Else the tests below would show nothing."""
    model = model_of()
    out = drawn(model)
    one = learner_of(model)
    mu = one.score(one.batch(out, REWARDS))[0]
    gap = (mu - out.logps)[out.completion_mask().bool()].abs()
    assert gap.mean() > 5e-3 and gap.max() > 0.05


@pytest.mark.parametrize("level, epochs, minibatches", itertools.product(("token", "sequence"), (1, 2), (1, 2)))
def test_on_policy_the_ratio_is_1_and_nothing_is_clipped(level, epochs, minibatches):
    model = model_of()
    one = learner_of(model, ratio_level=level, clip_low=3e-4, clip_high=3e-4, epochs=epochs, minibatches=minibatches)
    line = one.learn(drawn(model), REWARDS)
    assert line["clip_ratio"] == 0
    assert line["ratio_max_dev"] > 0.05 > line["ratio_mean_dev"] > 5e-3       # still those of the sampler


@pytest.mark.parametrize("settings", [{}, {"epochs": 2}, {"gtpo_gamma": 0.1}])
def test_the_gradient_is_that_of_the_trainers_own_mu(settings):
    """As if `prepare` had been given the trainer's log-probs; and not that of the sampler's."""
    algo = "gtpo" if "gtpo_gamma" in settings else "grpo"
    model = model_of()
    out = drawn(model)

    def gradients(convert):
        one, found = learner_of(model, algo, **settings), []
        one.state = type("State", (), {"initial_entropy": 9.0})()
        one.descend = lambda loss: found.append([p.grad.clone() for p in model.parameters()]) or 1.0
        batch = one.batch(out, REWARDS)
        convert(one, batch)
        one.make_pass(batch, 2)
        return found

    def by_hand(one, batch):
        batch.old_logp = one.score(batch)[0]

    ours = gradients(lambda one, batch: one.score_mu(batch, out.version))
    right, wrong = gradients(by_hand), gradients(lambda one, batch: None)
    assert len(ours) == settings.get("epochs", 1)
    assert all(torch.equal(a, b) for step, same in zip(ours, right) for a, b in zip(step, same))
    assert not all(torch.equal(a, b) for step, other in zip(ours, wrong) for a, b in zip(step, other))


@pytest.mark.parametrize("correction, level", [("decoupled", "token"), ("decoupled", "sequence"), ("decoupled", "geometric"),
                                               ("bypass", "sequence")])
def test_replay_of_what_has_not_moved_has_weights_of_1(correction, level):
    model = model_of()
    named = {"importance_level": level} if correction == "decoupled" else {}
    one = learner_of(model, "offpolicy", correction=correction, replay_ratio=3, clip_low=3e-4, clip_high=3e-4, **named)
    line = one.learn(drawn(model), REWARDS)
    assert line["replay_ratio"] == 3 and line["clip_ratio"] == 0
    assert line["ess"] == 1 and line["is_weight_max"] == 1 and line["kl_pi_mu"] == 0


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_stale_weights_are_scored_by_the_policy_that_drew(level):
    """The weights that drew have been left behind; W is the trainer's pi over the trainer's mu, row by row."""
    old, new = model_of(), model_of()
    with torch.no_grad():
        new.lm_head.weight[:40] *= 1.1
    out = drawn(old, version=0)
    one = learner_of(new, "offpolicy", replay_ratio=1, sync_every=4, importance_level=level, importance="standard")
    one.behaviour, one.progress.updates = old, 3

    batch = offpolicy.fresh_batch(one, out, REWARDS)
    plain = grpo.prepare(out, REWARDS, one.config)
    pi, mu = one.score(plain)[0], one.score(plain, model=old)[0]
    right = offpolicy.importance_weights(pi - mu, plain.mask, "standard", level)
    assert torch.equal(batch.weight, right) and (right - plain.mask).abs().max() > 2e-3


def test_weights_that_lag_but_have_not_moved_count_1():
    old, new = model_of(), model_of()
    one = learner_of(new, "offpolicy", replay_ratio=1, sync_every=4)
    one.behaviour, one.progress.updates = old, 3
    line = one.learn(drawn(old), REWARDS)
    assert line["ess"] == pytest.approx(1, abs=1e-6) and line["kl_pi_mu"] < 1e-9 and line["clip_ratio"] == 0


def test_in_float32_the_samplers_value_stays():
    model = model_of(torch.float32)
    one, out = learner_of(model, epochs=2), drawn(model)
    batch = one.batch(out, REWARDS)
    one.score_mu(batch, out.version)
    assert batch.old_logp is out.logps and batch.drawn_logp is None


@pytest.mark.parametrize("epochs, minibatches, more", [(1, 1, 0), (2, 1, 1), (1, 2, 1)])
def test_one_scoring_pass_at_most(epochs, minibatches, more, monkeypatch):
    """None where the rollout has one update, one where it has several."""
    model, calls = model_of(), []
    one = learner_of(model, epochs=epochs, minibatches=minibatches)
    score = learning.Learner.score
    monkeypatch.setattr(learning.Learner, "score", lambda *args, **named: calls.append(1) or score(*args, **named))
    one.learn(drawn(model), REWARDS)
    assert len(calls) == more
