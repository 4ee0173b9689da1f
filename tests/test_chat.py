"""The specification of chat templates, of how a completion ends, and of the text that is graded."""
import json
import os
import resource
import subprocess
import sys
import threading
from copy import deepcopy

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

import chat
import config
import evaluate
import prompts
import reward
import sft
import thoughts
import user_reward
from model import ModelConfig, Transformer
from rollout import Rollout, draw_groups
from test_model import edit_json

@pytest.mark.parametrize("platform, kinds", [("linux", [resource.RLIMIT_AS, resource.RLIMIT_CPU]), ("darwin", [resource.RLIMIT_CPU])])
def test_macos_is_not_asked_for_a_bound_of_memory(platform, kinds, monkeypatch):
    """It refuses RLIMIT_AS (EINVAL), and no template would be rendered there."""
    bounded = []
    monkeypatch.setattr(chat.sys, "platform", platform)
    monkeypatch.setattr(chat.resource, "setrlimit", lambda kind, limits: bounded.append(kind))
    chat.limit({"conversations": [], "seconds": 5})
    assert bounded == kinds


SPECIAL = ["<|im_start|>", "<|im_end|>", "<answer>", "</answer>", "<think>", "</think>", "<pad>"]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
          "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
          "{% if enable_thinking is defined and not enable_thinking %}"
          "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")
ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How\n many? 中"}]


@pytest.fixture(scope="module")
def plain():
    found = prompts.train_tokenizer(["The answer is 4. How many? system user assistant"] * 4, 300)
    found.add_special_tokens({"additional_special_tokens": SPECIAL})
    return found


@pytest.fixture
def base(plain):
    """The tokenizer of a base model: its eos does not end the turns of its chat template."""
    found = deepcopy(plain)
    found.chat_template = CHATML
    return found


def test_a_problem_may_bring_its_own_system_message(base):
    """In the place of BOXED_PROMPT; above the question where there is no chat; --template reasoning stays what was asked for."""
    problem = {"problem": "How many?", "answer": "4", "system": "Be brief."}
    found, = prompts.tokenize_prompts([problem], base, "chat", 400)
    assert found["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    assert base.decode(found["prompt"]) == prompts.render(base, [found["messages"]], add_generation_prompt=True)[0]
    assert prompts.prompt_texts([problem], base, "plain") == ["Be brief.\n\nHow many?\n"]
    text, = prompts.prompt_texts([problem], base, "reasoning")
    assert prompts.REASONING_PROMPT in text and "Be brief." not in text


def id_of(tokenizer, token):
    return tokenizer.convert_tokens_to_ids(token)


def small_model(tokenizer, **changes):
    shape = {"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8, "head_dim": 4,
             "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1,
             "eos_token_id": tokenizer.eos_token_id}
    return Transformer(ModelConfig(**{**shape, **changes})).init_weights()


@pytest.fixture
def saved(base, tmp_path):
    """A base checkpoint with a chat template, in a folder."""
    small_model(base).save_pretrained(tmp_path / "base")
    prompts.save_tokenizer(base, tmp_path / "base")
    return tmp_path / "base"


# ---------------------------------------------------------------------- a template within bounds

TEMPLATES = {
    "chatml": CHATML,
    "llama 3": "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content | trim }}"
               "{{ eos_token }}{% endfor %}",
    "whitespace": "{%- for m in messages %}\n    {%- if not loop.last %}\n  {{ m.content }}\n"
                  "    {% endif %}\n{% endfor %}\n",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ '<&' | tojson }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
                 "{% if m.role == 'user' %}{% continue %}{% endif %}{{ ns.n }}{% endfor %}{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
                  "{% endfor %}{{ dict(a=1)['a'] }}{{ tools is none }}{{ documents is none }}",
    "macro": "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0].content) }}{{ date_string }}",
    "sandbox": "{{ messages.__class__ }}|{{ messages[0].content.split('.') | list }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_transformers_writes(plain, name):
    tokenizer = deepcopy(plain)
    tokenizer.chat_template = TEMPLATES[name]
    for more in ({}, {"add_generation_prompt": True}):
        expected = tokenizer.apply_chat_template(ASK, tokenize=False, date_string="26 Jul 2024", **more)
        assert prompts.render(tokenizer, [ASK, ASK], **more) == [expected, expected]


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{{ 'a' * 10**10 }}",
    "product of variables": "{% set n = 10**9 %}{% set x = ['a'] * n %}{{ x }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
                "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
                    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "filter": "{{ 'a' | center(10**10) }}",
    "power": "{{ (10 ** 10) ** (10 ** 9) }}",
    "long": "{% for a in range(99999) %}{{ 'a' * 99 }}{% endfor %}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "syntax": "{% for",
    "several lines": "{{ raise_exception('no\nsystem\nmessage') }}",
    "hidden names": "{{ namespace(__class__=1) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_would_not_end_is_one_line(base, name, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1)
    base.chat_template = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="^the chat template refuses this prompt .*--template plain$"):
        prompts.prompt_text("How many?", base, "chat")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 18      # kB
    assert prompts.prompt_text("How many?", base, "plain") == "How many?\n"
    assert prompts.stop_ids(small_model(base), base) == [base.eos_token_id]


def test_a_template_is_bounded_off_the_main_thread_too(base):
    base.chat_template = HOSTILE["text"]
    met = []

    def ask():
        try:
            prompts.prompt_text("How many?", base, "chat")
        except ValueError as error:
            met.append(str(error))
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "MB" in met[0]


def test_today_s_date_is_always_the_same():
    text, = chat.render("{{ strftime_now('%d %b %Y') }}", [ASK], {})
    assert text == "26 Jul 2024"


def test_a_tokenizer_with_a_way_of_its_own_is_asked(base, monkeypatch):
    """Mistral's has no Jinja template; it gets the same options."""
    seen = []
    monkeypatch.setattr(base, "apply_chat_template", lambda *a, **k: seen.append(k) or "text")
    base.chat_options = {"enable_thinking": False}
    assert prompts.prompt_text("How many?", base, "chat") == "text"
    assert seen[0]["enable_thinking"] is False and seen[0]["tokenize"] is False


# -------------------------------------------------------------------------- which template, and why

def said(tokenizer, template="auto"):
    lines = []
    prompts.report_template(tokenizer, template, lines.append)
    line, = lines
    return line


def test_a_base_model_gets_plain_text_and_is_told_so(saved):
    tokenizer = prompts.load_tokenizer(saved)
    assert not prompts.uses_chat(tokenizer, "auto")
    assert said(tokenizer).startswith("template: plain (a base model: <|im_end|> ends a turn")
    assert said(tokenizer, "chat") == "template: chat (<|im_end|> ends a turn)"
    assert said(tokenizer, "plain") == "template: plain"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_chat_model_whose_tokenizer_kept_the_base_eos_gets_its_chat_template(saved, file, as_list):
    """One of the checkpoint's files names the end of a turn."""
    end = id_of(prompts.load_tokenizer(saved), "<|im_end|>")
    edit_json(saved / file, lambda c: c.update(eos_token_id=[end, 0] if as_list else end))
    tokenizer = prompts.load_tokenizer(saved)
    assert prompts.uses_chat(tokenizer, "auto")
    assert said(tokenizer).startswith("template: chat (<|im_end|> ends a turn")
    assert end in prompts.stop_ids(Transformer.from_pretrained(saved), tokenizer)


def test_a_tokenizer_without_a_chat_template_says_so(plain):
    assert said(plain) == "template: plain (the tokenizer has no chat template)"


@pytest.mark.parametrize("value", [[[2]], "2", True, 2.5, {"a": 1}, [None]])
def test_an_eos_that_is_no_id_is_one_line(saved, value):
    edit_json(saved / "generation_config.json", lambda c: c.update(eos_token_id=value))
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id must be"):
        prompts.load_tokenizer(saved)
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id must be"):
        model = Transformer.from_pretrained(saved)
        prompts.stop_ids(model, prompts.train_tokenizer(["a"], 300))


# ------------------------------------------------------------------------------- how a turn ends

@pytest.mark.parametrize("template, ends", [
    (CHATML, ["<|im_end|>"]),
    ("{% for m in messages %}{{ m.content }} <|im_end|> \n{% endfor %}", ["<|im_end|>"]),
    ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", [prompts.EOS]),
    ("{% for m in messages %}{{ m.content }}{{ '<pad>' if loop.last else '<|im_end|>' }}{% endfor %}",
     ["<pad>", "<|im_end|>"]),
    ("{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% endfor %}", ["<|im_start|>"]),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", []),
    ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", []),
    (None, []),
])
def test_what_follows_an_answer_ends_a_turn(base, template, ends):
    base.chat_template = template
    assert base.convert_ids_to_tokens(prompts.turn_ends(base)) == ends
    expected = {id_of(base, token) for token in ends} | {base.eos_token_id}
    assert prompts.stop_ids(small_model(base), base) == sorted(expected)


def test_an_end_outside_the_model_s_vocabulary_stops_nothing(base):
    assert prompts.stop_ids(small_model(base, vocab_size=290), base) == [base.eos_token_id]


def test_sft_teaches_the_end_of_the_turn_in_use(base):
    problem = [{"problem": "a", "answer": "5", "solution": "5"}]

    def end(tokenizer, **settings):
        pair, = sft.corpus(problem, tokenizer, sft.SFTConfig(**settings))
        return tokenizer.convert_ids_to_tokens(pair[1][-1])
    assert end(base) == end(base, template="plain") == prompts.EOS
    assert end(base, template="chat") == "<|im_end|>"

    chatml = base.chat_template      # where the last turn ends otherwise, the eos among both ends is taught
    base.chat_template = "{% for m in messages %}{{ m.content }}{{ '<pad>' if loop.last else eos_token }}{% endfor %}"
    assert base.convert_ids_to_tokens(prompts.turn_ends(base)) == ["<pad>", prompts.EOS]
    assert end(base, template="chat") == prompts.EOS
    base.chat_template = chatml

    base.eos_token = None
    assert end(base, template="chat") == "<|im_end|>"
    with pytest.raises(ValueError, match="no stop token: the tokenizer has no eos_token"):
        end(base, template="plain")
    base.file_stops = [id_of(base, "<pad>")]
    assert end(base, template="plain") == "<pad>"


def test_a_base_model_that_was_taught_chat_is_taken_for_a_chat_model(saved, tmp_path):
    rows = [{"problem": f"How many? {i}", "answer": "4", "solution": "The answer is 4."} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sft.main(["--data", str(tmp_path / "d.jsonl"), "--model", str(saved), "--template", "chat",
              "--steps", "1", "--out", str(tmp_path / "out"), "--threads", "1"])
    tokenizer = prompts.load_tokenizer(tmp_path / "out")
    assert prompts.uses_chat(tokenizer, "auto")
    ids = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert ids == [tokenizer.eos_token_id, id_of(tokenizer, "<|im_end|>")]


# ------------------------------------------------------------------------ the text that is graded

def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text, seen", [
    ("<think>a</think><answer>4</answer>", "<think>a</think><answer>4</answer>"),
    ("4<|im_end|>\n<|im_start|>user\n5", "4"),
    ("4<|endoftext|>5<|im_end|>", "4"),
    ("<pad>4<pad>", "<pad>4<pad>"),         # a completion has no padding: "0" may be that token
    ("<|im_end|>4", ""), ("", ""), ("<|im_start|>4", "<|im_start|>4"),
])
def test_the_stop_token_is_taken_away_and_nothing_else(base, text, seen):
    base.pad_token = "<pad>"
    stops = prompts.stop_ids(small_model(base), base)
    assert prompts.decode(base, [ids_of(base, text)], stops) == [seen]


def test_an_invented_second_turn_is_not_graded(base):
    """Whatever the sampler returns: what stands behind the first stop token is not seen."""
    text = ("The answer is \\boxed{4}.<|im_end|>\n<|im_start|>user\nWhat is 2+3?<|im_end|>\n"
            "<|im_start|>assistant\n\\boxed{5}<|endoftext|>")
    ids = torch.tensor([[1, *ids_of(base, text)]])

    class Drawn:
        model = small_model(base)
        eos_ids = torch.tensor(prompts.stop_ids(model, base))

        def generate(self, *args, **options):
            length = torch.tensor([ids.shape[1]])
            return Rollout(ids, torch.tensor([1]), length, ids * 0.0, torch.tensor([True]))

    _, ((seen,),) = draw_groups(Drawn(), base, [{"prompt": [1]}], 1, 99, 1.0, [0])
    assert seen == "The answer is \\boxed{4}."
    assert reward.verify(seen, "4") and not reward.verify(seen, "5")


# ------------------------------------------------------------------------- --chat-template-kwargs

@pytest.mark.parametrize("text, kwargs", [
    ("", {}), ("{}", {}), ('{"enable_thinking": false}', {"enable_thinking": False}),
    ('{"a": 1, "b": "x", "c": null, "d": 0.5}', {"a": 1, "b": "x", "c": None, "d": 0.5})])
def test_template_kwargs_are_a_json_object(text, kwargs):
    assert config.parse_template_kwargs(text) == kwargs
    parsed = config.parse(["--chat-template-kwargs", text])
    assert config.parse_template_kwargs(parsed.chat_template_kwargs) == kwargs


@pytest.mark.parametrize("text", [
    "{", "[1]", "3", "null", "enable_thinking=False", "{'enable_thinking': False}", '{"a": [1]}',
    '{"a": {}}', '{"a": NaN}', '{"a": Infinity}', '{"messages": 1}', '{"tokenize": true}',
    '{"add_generation_prompt": false}', '{"a b": 1}', "[" * 100_000, "\ud800"])
def test_other_template_kwargs_are_one_line(text):
    for parse in (config.parse, sft.parse, lambda argv: evaluate.parse([*argv, "--model", "x"])):
        with pytest.raises(ValueError, match="--chat-template-kwargs") as caught:
            parse(["--chat-template-kwargs", text])
        assert "\n" not in str(caught.value)


def test_a_thought_that_the_template_opened_has_no_answer_until_it_is_closed(base):
    """As of R1-Distill or Qwen3-Thinking: the prompt ends with <think>, and the completion has no mark of it."""
    base.chat_template = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
    problem = {"problem": "What is 2 + 3? Write <think> first.", "answer": "5"}
    [open_one] = prompts.tokenize_prompts([problem], base, "chat", 500)
    [plain_one] = prompts.tokenize_prompts([problem], base, "plain", 500)
    assert open_one["opened"] == "<think>" and "opened" not in plain_one

    cut = "It must be \\boxed{5}. But wait, let me check"
    whole = "It must be 6.</think><answer>5</answer>"
    for one, right, form in ((open_one, [0, 1], [0, 1]), (plain_one, [1, 1], [0, 0])):
        assert reward.correct([one], [[cut, whole]]) == [right] and reward.think([one], [[cut, whole]]) == [form]
        assert evaluate.grade_for(one, [cut, whole])["lenient"]["right"] == right
        checked = {**one, "check": lambda text: text.startswith("<think>")}
        assert reward.correct([checked], [[cut]]) == [[float(one is open_one)]]
        assert user_reward.columns([one], [[cut]], [[1]])["completions"][0] in (cut, [{"role": "assistant", "content": cut}])


def test_solutions_that_leave_a_thought_open_are_not_taught(base):
    """A model that learned them would never be right: its thoughts would have no end."""
    base.chat_template = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
    problems = [{"problem": "2 + 3?", "answer": "5", "solution": solution} for solution in ("a</think>#### 5", "2 + 3 = 5\n#### 5")]
    settings = {"hidden_size": 32, "max_length": 500}
    assert len(sft.corpus(problems[:1], base, sft.SFTConfig(template="chat", **settings))) == 1
    assert len(sft.corpus(problems, base, sft.SFTConfig(template="plain", **settings))) == 2
    with pytest.raises(ValueError, match="opens a thought .<think>., which a solution does not close"):
        sft.corpus(problems, base, sft.SFTConfig(template="chat", **settings))


@pytest.mark.parametrize("prompt, mark", [
    ("a\n<think>\n", "<think>"), ("a <think>\n\n</think>\n\n", ""), ("say <think> first", ""), ("", ""), ("[THINK]", "[THINK]"),
    ("<|begin_of_thought|>\n\n", "<|begin_of_thought|>"), ("<|channel|>analysis<|message|>", "<|channel|>analysis<|message|>"),
    ("<|channel|>final<|message|>", ""), ("x" * 500 + "<think>", "<think>")])
def test_how_a_prompt_ends(prompt, mark):
    assert thoughts.opened(prompt) == mark


def test_thinking_is_switched_off(saved):
    on = prompts.load_tokenizer(saved)
    off = prompts.load_tokenizer(saved, {"enable_thinking": False})
    problem = [{"problem": "How many?"}]
    text, = off.batch_decode(prompts.encode_prompts(problem, off, "chat"))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert prompts.prompt_text("How many?", on, "chat").endswith("<|im_start|>assistant\n")
    assert said(off, "chat") == 'template: chat (<|im_end|> ends a turn) with {"enable_thinking": false}'


def test_template_kwargs_that_do_nothing_are_refused(saved):
    with pytest.raises(ValueError, match="needs a chat template"):
        said(prompts.load_tokenizer(saved, {"enable_thinking": False}), "plain")
    with pytest.raises(ValueError, match="does not read enable_thinkin; it reads .*enable_thinking"):
        said(prompts.load_tokenizer(saved, {"enable_thinkin": False}), "chat")


def test_only_what_a_template_reads_and_does_not_set_is_an_option():
    """A word of its text, the variable of a loop and what it sets are none, and neither is what every template is given."""
    template = ("{% set said = 1 %}{% for message in messages %}{{ message.content }} think {{ said }}{{ loop.index }}{% endfor %}"
                "{% if enable_thinking %}{{ raise_exception('no') }}{% endif %}")
    assert prompts.names_read(template) == {"messages", "enable_thinking"}


def test_a_run_s_model_is_evaluated_as_it_was_trained(tmp_path, monkeypatch):
    run = {"algo": "grpo", "template": "chat", "chat_template_kwargs": '{"enable_thinking": false}'}
    (tmp_path / "config.json").write_text(json.dumps(run))
    follows = evaluate.EvalConfig(model=str(tmp_path / "model"))
    prompts.follow_run(follows)
    assert (follows.template, follows.chat_template_kwargs) == ("chat", run["chat_template_kwargs"])

    given = evaluate.EvalConfig(model=str(tmp_path / "model"), template="reasoning",
                                chat_template_kwargs='{"enable_thinking": true}')
    prompts.follow_run(given)
    assert (given.template, given.chat_template_kwargs) == ("reasoning", '{"enable_thinking": true}')

    # the folder may also be named by a link to it, or by "." from inside
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    for name in (".", str(tmp_path / "elsewhere" / "link")):
        assert prompts.settings_of_run(name) == run

    (tmp_path / "model" / "sft.json").write_text('{"--template": "r1-zero", "--chat-template-kwargs": ""}')
    of_sft = evaluate.EvalConfig(model=str(tmp_path / "model"))
    prompts.follow_run(of_sft)
    assert (of_sft.template, of_sft.chat_template_kwargs) == ("r1-zero", "")

    (tmp_path / "model" / "adapter").mkdir()
    (tmp_path / "model" / "adapter" / "adapter_config.json").write_text("{}")
    of_adapter = evaluate.EvalConfig(model=str(tmp_path / "model" / "adapter"))
    prompts.follow_run(of_adapter)
    assert of_adapter.template == "r1-zero"
    (tmp_path / "model" / "sft.json").unlink()

    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    other = evaluate.EvalConfig(model=str(tmp_path / "model"))
    prompts.follow_run(other)
    assert other == evaluate.EvalConfig(model=str(tmp_path / "model"))


@pytest.mark.slow
def test_thinking_stays_off_in_training_on_resume_and_in_evaluation(saved, tmp_path):
    rows = [{"problem": f"How many? {i}", "answer": "4"} for i in range(12)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = ["--data", str(tmp_path / "d.jsonl"), "--threads", "1", "--max-new-tokens", "4"]
    run = str(tmp_path / "run")

    def program(name, *argv):
        done = subprocess.run([sys.executable, f"{name}.py", *argv], capture_output=True, text=True,
                              cwd=os.path.dirname(chat.__file__))
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr
    said = 'template: chat (<|im_end|> ends a turn) with {"enable_thinking": false}'
    assert said in program("train", *shared, "--model", str(saved), "--template", "chat", "--out", run,
                           "--chat-template-kwargs", '{"enable_thinking": false}', "--steps", "1",
                           "--prompts-per-step", "2", "--eval-problems", "2", "--save-every", "1")
    assert said in program("train", "--resume", "--out", run, "--steps", "2")
    assert said in program("evaluate", *shared, "--model", f"{run}/model", "--samples", "1")
