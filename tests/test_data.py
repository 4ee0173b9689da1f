"""Sources, the built-in task, templates, order and tokenizers."""
import builtins
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import muon
import prompts
import reward
import sft
import tasks
from config import Config
from model import ModelConfig, Transformer
from puzzles.arithmetic import LARGEST, arithmetic

torch.set_num_threads(1)
PROBLEMS = Path(__file__).resolve().parents[2] / "shared" / "data" / "problems"


def write(folder, *lines):
    file = folder / "problems.jsonl"
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return file


@pytest.fixture(scope="module")
def tokenizer():
    problems = arithmetic(500)
    questions = [p["problem"] + "\n" for p in problems]
    return prompts.train_tokenizer(questions + [p["solution"] for p in problems])


# -------------------------------------------------------------------------------------------- jsonl

HALF = {"problem": "Half?", "solution": "It is \\boxed{\\frac{1}{2}}.", "level": "Level 1"}
BOTH = {"problem": "48 + 24?", "answer": "72", "solution": "Because.\n#### 71"}


@pytest.mark.parametrize("row, answer", [
    ({"problem": "48 + 24?", "answer": "72"}, "72"),
    ({"question": "48 + 24?", "answer": "48+24 = <<48+24=72>>72 clips.\n#### 72"}, "72"),   # GSM8K
    ({"problem": "48 + 24?", "solution": "It is $48+24=\\boxed{72}$."}, "72"),              # MATH
    (HALF, "\\frac{1}{2}"),
    ({"problem": "48 + 24?", "answer": 72}, "72"),
    (BOTH, "72"),                                                       # the answer field rules
])
def test_every_layout_gives_problem_and_answer(tmp_path, row, answer):
    problem, = data.load_problems(str(write(tmp_path, row)))
    assert problem["answer"] == answer
    assert problem["problem"] == (row.get("problem") or row["question"])


def test_what_gsm8k_writes_for_a_calculator_is_left_out(tmp_path):
    """In both fields that hold solutions; shifts of bits and an open mark are none."""
    said = "48+24 = <<48+24=72>>72 clips, 1 << 2, a<<b and c>>d, <<5.\n#### 72"
    for row in ({"question": "?", "answer": said}, {"problem": "?", "solution": said, "answer": "72"}):
        problem, = data.load_problems(str(write(tmp_path, row)))
        assert problem["solution"] == "48+24 = 72 clips, 1 << 2, a<<b and c>>d, <<5.\n#### 72" and problem["answer"] == "72"


@pytest.mark.parametrize("line, reason", [
    ('{"problem": "half', "Unterminated string"),
    ('["a"]', "not a JSON object"),
    ('{"answer": "1"}', '"problem" or "question"'),
    ('{"problem": "x", "solution": "no end"}', 'no "answer"'),
    ('{"problem": "", "answer": "1"}', "no text"),
    ('{"problem": "x", "answer": true}', 'no "answer"'),
    ('{"problem": "x", "answer": "4", "solution": 5}', 'no text in the field "solution"'),
    ('{"problem": "x", "answer": "4", "solution": ["a"]}', 'no text in the field "solution"'),
])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, reason):
    file = write(tmp_path, {"problem": "1?", "answer": "1"}, "", line)
    with pytest.raises(ValueError) as error:
        data.load_problems(str(file))
    said = str(error.value)
    assert said.startswith(f"{file}:3: ") and reason in said and "\n" not in said


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl: no such file"):
        data.load_problems(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match="holds no problems"):
        data.load_problems(str(write(tmp_path, "")))


def test_other_encodings_are_named_and_a_byte_order_mark_is_not_minded(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"problem": "1?", "answer": "1"}'.encode())
    assert data.load_problems(str(file))[0]["answer"] == "1"
    file.write_bytes('{"problem": "caf\u00e9?", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="p.jsonl: not UTF-8"):
        data.load_problems(str(file))


def test_line_separators_inside_a_string_do_not_cut_it(tmp_path):
    """U+2028, as in GSM8K: str.splitlines would cut there."""
    problem, = data.load_problems(str(write(tmp_path, '{"problem": "a\u2028b", "answer": "1"}')))
    assert problem["problem"] == "a\u2028b"


def take_away(monkeypatch, package):
    """Let imports of a package fail, as where it is not installed."""
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == package:
            raise ImportError()
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)


def test_without_the_datasets_library_the_way_out_is_named(monkeypatch):
    take_away(monkeypatch, "datasets")
    with pytest.raises(FileNotFoundError, match=r"pip install datasets.*--data gsm8k_train\.jsonl"):
        data.load_problems("gsm8k")


def fake_hub(monkeypatch, rows):
    import sys
    from types import SimpleNamespace
    calls = []

    def load_dataset(*args, split):
        calls.append((*args, split))
        return rows
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_the_hub_gives_gsm8k_and_math_and_rows_without_an_answer_are_dropped_loudly(monkeypatch):
    said = []
    calls = fake_hub(monkeypatch, [{"question": "2+2?", "answer": "2+2=4\n#### 4"}])
    assert data.load_problems("gsm8k", "test")[0]["answer"] == "4"
    assert calls == [("openai/gsm8k", "main", "test")]

    rows = [{"problem": "Two?", "solution": "It is $\\boxed{2}$."},
            {"problem": "How many?", "solution": "There are $\\boxed{}$."}]
    calls = fake_hub(monkeypatch, rows)
    problems = data.load_problems("math", "train", report=said.append)
    assert len(calls) == 7 and [p["answer"] for p in problems] == ["2"] * 7
    assert len(said) == 7 and "math/train/1" in said[0]


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import sys
    from types import SimpleNamespace

    def load_dataset(*args, split):
        raise ConnectionError("no route\nto host")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(FileNotFoundError, match="--data math_train.jsonl") as error:
        data.load_problems("math")
    assert "\n" not in str(error.value)


def test_problems_with_an_empty_answer_are_dropped_and_counted(tmp_path):
    said = []
    file = write(tmp_path, {"problem": "1?", "answer": "1"}, {"problem": "2?", "answer": " "})
    assert len(data.load_problems(str(file), report=said.append)) == 1
    assert "dropped 1 of 2" in said[0]


@pytest.mark.parametrize("answer", ["null", "NaN", "Infinity", "-Infinity", "1e999", '""', '" "'])
def test_what_is_no_answer_is_dropped_and_counted_whatever_it_is_written_as(tmp_path, answer):
    said = []
    file = write(tmp_path, '{"problem": "1?", "answer": "1"}',
        f'{{"problem": "2?", "answer": {answer}}}')
    problem, = data.load_problems(str(file), report=said.append)
    assert problem["problem"] == "1?"
    assert said == [f"data: dropped 1 of 2 problems of {file}: 1 with an empty answer"]


def test_an_empty_answer_field_leaves_the_answer_to_the_solution(tmp_path):
    row = {"problem": "2?", "answer": None, "solution": "It is $\\boxed{2}$."}
    assert data.load_problems(str(write(tmp_path, row)))[0]["answer"] == "2"


@pytest.mark.parametrize("answer", [
    "$", "\\text{}", "\\frac{1}{2", "1}, {2", "</think> 5", "5<|im_end|>"])
def test_a_gold_answer_that_does_not_verify_against_itself_is_dropped_and_counted(tmp_path, answer):
    said = []
    file = write(tmp_path, {"problem": "1?", "answer": "1"}, {"problem": "2?", "answer": answer},
                 {"problem": "3?", "answer": ""})
    problem, = data.load_problems(str(file), report=said.append)
    assert problem["answer"] == "1"
    assert said == [f"data: dropped 2 of 3 problems of {file}: 1 with an empty answer, "
                    "1 whose answer does not verify against itself"]


def test_a_gold_answer_of_a_letter_and_its_value_is_kept_and_either_is_right(tmp_path):
    row = {"problem": "q", "solution": "so $\\boxed{\\textbf{(C)}\\ 12}$"}
    problem, = data.load_problems(str(write(tmp_path, row)), report=pytest.fail)
    for given in ("C", "(C)", "12", "\\textbf{(C)}\\ 12"):
        assert reward.verify(f"\\boxed{{{given}}}", problem["answer"])
    assert not reward.verify("\\boxed{D}", problem["answer"])


def test_digits_cost_no_call_of_the_verifier(tmp_path, monkeypatch):
    """Twenty thousand answers are tried in a moment: most are digits, which need no trial."""
    calls = []
    monkeypatch.setattr(reward, "verify", lambda *args: calls.append(args) or True)
    rows = [{"problem": f"{i}?", "answer": str(i)} for i in range(500)]
    assert len(data.load_problems(str(write(tmp_path, *rows)))) == 500 and not calls
    assert len(data.load_problems(str(write(tmp_path,
        {"problem": "q", "answer": "x"})))) == len(calls) == 1


@pytest.mark.parametrize("text", [
    '[{"problem": "1?", "answer": "1"}]', '[\n {"problem": "1?",\n "answer": "1"}\n]', " \n[\n]",
    '\ufeff[{"problem": "1?", "answer": "1"}]'])
def test_a_json_array_is_told_that_one_object_a_line_is_needed(tmp_path, text):
    file = write(tmp_path, text)
    with pytest.raises(ValueError, match="one object a line is needed") as error:
        data.load_problems(str(file))
    assert str(error.value).startswith(f"{file}:") and "\n" not in str(error.value)


@pytest.mark.parametrize("row, expected", [
    pytest.param({"prompt": "1+1?", "solution": "so \\boxed{2}"}, ("1+1?", "2", None), id="trl"),
    pytest.param({"prompt": [{"role": "user", "content": "1+1?"}], "data_source": "x", "ability": "MATH",
                  "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"index": 7}}, ("1+1?", "2", None), id="verl"),
    pytest.param({"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
                  "reward_model": {"ground_truth": 2}}, ("1+1?", "2", "Be brief."), id="verl with a system message"),
    pytest.param({"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "1+1=2\n#### 2"}]},
                 ("1+1?", "2", None), id="chat"),
    pytest.param({"problem": "1+1?", "answer": "2", "system": "Be brief.", "prompt": "other"}, ("1+1?", "2", "Be brief."), id="own fields first"),
    pytest.param({"problem": "1+1?", "answer": "2", "system": 7}, ("1+1?", "2", None), id="a number is no message"),
    pytest.param({"prompt": "1+1?", "reward_model": {"ground_truth": None}}, ("1+1?", "", None), id="null is the empty answer")])
def test_layouts_of_trl_verl_and_chats(row, expected):
    problem = data.normalize(row, "n")
    assert (problem["problem"], problem["answer"], problem.get("system")) == expected
    assert not {"prompt", "messages"} & problem.keys()
    if "messages" in row:
        assert problem["solution"] == "1+1=2\n#### 2"


@pytest.mark.parametrize("turns, said", [
    ([{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "2?"}], "several turns"),
    ([{"role": "system", "content": "1?"}], "without a question"), ([{"role": "user", "content": [{"type": "image"}]}], "messages"),
    (["1?"], "messages"), ([{"role": "tool", "content": "1"}], "messages")])
def test_conversations_that_are_no_problem_are_one_line(turns, said, tmp_path):
    with pytest.raises(ValueError, match=f":1: .*{said}") as error:
        data.load_problems(str(write(tmp_path, {"prompt": turns, "answer": "1"})))
    assert "\n" not in str(error.value)


def test_an_indented_object_is_told_so_too(tmp_path):
    with pytest.raises(ValueError, match=":1: .*one object a line is needed"):
        data.load_problems(str(write(tmp_path, '{\n "problem": "1?",\n "answer": "1"\n}')))


@pytest.mark.parametrize("field", ["problem", "answer", "solution", "level", "id"])
def test_half_a_character_is_named_by_file_line_and_field(tmp_path, field):
    """JSON may hold a lone surrogate, which no encoding has: tokenizers and checksums would raise."""
    row = {"problem": "1?", "answer": "1", field: "half \ud83d"}
    file = write(tmp_path, {"problem": "\N{GRINNING FACE}?", "answer": "1"}, row)
    with pytest.raises(ValueError, match=f'lone surrogate.*"{field}"') as error:
        data.load_problems(str(file))
    assert str(error.value).startswith(f"{file}:2: ")
    str(error.value).encode()


@pytest.mark.parametrize("digits", [310, 4000])
def test_a_long_integer_is_an_answer_and_a_longer_one_is_one_line(tmp_path, digits):
    file = write(tmp_path, '{"problem": "q", "answer": ' + "9" * digits + "}")
    assert data.load_problems(str(file))[0]["answer"] == "9" * digits
    file = write(tmp_path, '{"problem": "q", "answer": ' + "9" * 5000 + "}")
    with pytest.raises(ValueError, match=r"problems.jsonl:1: ") as error:
        data.load_problems(str(file))
    assert len(str(error.value)) < 400


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
                 st.lists(st.integers(), max_size=2),
                 st.dictionaries(st.text(max_size=2), st.none(), max_size=1)))
def test_any_answer_is_loaded_dropped_or_one_line(tmp_path_factory, answer):
    file = write(tmp_path_factory.mktemp("any"), {"problem": "1?", "answer": "1"},
        {"problem": "2?", "answer": answer})
    said = []
    try:
        problems = data.load_problems(str(file), report=said.append)
    except ValueError as error:
        assert str(error).startswith(f"{file}:2: ") and "\n" not in str(error)
    else:
        assert len(problems) == 2 - len(said)
        assert all(reward.verifies_itself(p["answer"]) for p in problems)


def test_held_out_problems_of_a_file_never_overlap_with_training():
    # 90 texts, ten of them twice
    problems = [{"problem": f"question {i % 90}", "answer": "1"} for i in range(100)]
    train, held_out = data.hold_out(problems, 5)
    assert len(train) + len(held_out) == 100 and 5 <= len(held_out) <= 10
    assert not {p["problem"] for p in train} & {p["problem"] for p in held_out}
    assert data.hold_out(problems[::-1], 5)[1][0]["problem"] in {p["problem"] for p in held_out}
    with pytest.raises(ValueError, match="--eval-data"):
        data.hold_out(problems[:3], 5)


@pytest.mark.skipif(not PROBLEMS.exists(), reason="GSM8K and MATH are not here")
@pytest.mark.parametrize("name, count", [
    ("gsm8k_train", 7473), ("gsm8k_test", 1319), ("math500", 500)])
def test_the_real_files_load_whole(name, count):
    problems = data.load_problems(str(PROBLEMS / f"{name}.jsonl"))
    assert len(problems) == count and all(p["answer"] for p in problems)


# -------------------------------------------------------------------------------- the built-in task

def follow(problem):
    """Solve a story independently, with nothing but regular expressions. Returns its result."""
    first, *sentences = [s.strip() for s in problem["problem"].rstrip("?").split(".")[:-1]]
    value = int(re.search(r"\d+", first)[0])

    for s in sentences:
        if "half" in s:
            value //= 2
        elif re.search(r"doubles|as many again|twice", s):
            value *= 2
        elif re.search(r"finds|buys|brings|gets|arrive|wins|adds", s):
            value += int(re.search(r"\d+", s)[0])
        else:
            assert re.search(r"loses|gives|sells|takes|break|puts|drops", s), s
            value -= int(re.search(r"\d+", s)[0])
    return value


@pytest.mark.parametrize("split", ["train", "test"])
def test_stories_mean_what_their_answers_say(split):
    for p in arithmetic(2000, split, seed=3, levels=(2, 8)):
        assert follow(p) == int(p["answer"])
        *lines, last = p["solution"].splitlines()
        assert len(lines) == p["level"] and last == "#### " + p["answer"]
        for line in lines:
            left, sign, right, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", line).groups()
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)
            assert 1 <= int(result) <= LARGEST
        assert reward.verify(p["solution"], p["answer"])


def test_held_out_stories_never_occur_in_training_even_with_other_words():
    def numbers(problem):
        """The start and the operations, such as ("7", "+5", "/2")."""
        lines = problem["solution"].splitlines()[:-1]
        start = re.match(r"\d+", lines[0])[0]
        return start, *(re.sub(r"^\d+|=.*", "", line) for line in lines)

    train = {numbers(p) for seed in range(3) for p in arithmetic(5000, "train", seed, (2, 3))}
    test = {numbers(p) for p in arithmetic(1000, "test", 0, (2, 3))}
    assert not train & test


def test_held_out_problems_of_a_task_are_the_same_for_every_seed_of_a_run():
    """Else the accuracies of two seeds would be of two exams."""
    (train, held_out), (other_train, same) = [data.load_split(Config(seed=seed, eval_problems=20)) for seed in (0, 1)]
    texts = [[p["problem"] for p in problems] for problems in (held_out, same, train[:20], other_train[:20])]
    assert texts[0] == texts[1] and texts[2] != texts[3]


def test_the_task_depends_on_its_seed_alone_and_has_many_surface_forms():
    first, again, other = (arithmetic(50, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    problems = arithmetic(3000, levels=(2, 8))
    assert {p["level"] for p in problems} == set(range(2, 9))
    assert len({p["problem"] for p in problems}) > 2900
    with pytest.raises(ValueError, match="fewest <= most"):
        arithmetic(1, levels=(4, 2))


# ------------------------------------------------------------------------------- the table of tasks

def echo(count, split="train", seed=0, levels=(1, 1)):
    """A task with a checker of its own: any text with the asked number of letters a is right."""
    numbers = [levels[0] + i % (levels[1] - levels[0] + 1) for i in range(count)]
    return [{"problem": f"Write {n} times a ({split}, {seed}, {i}).", "answer": "a" * n,
             "solution": "a" * n, "task": "echo", "level": n, "id": f"echo/{i}"}
            for i, n in enumerate(numbers)]


@pytest.fixture
def echo_task(monkeypatch):
    task = tasks.Task(echo, lambda problem, completion: completion.count("a") == problem["level"])
    monkeypatch.setitem(tasks.TASKS, "echo", task)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_gives_whole_problems_that_its_own_solution_solves(name):
    for split in ("train", "test"):
        problems = tasks.problems(name, 60, split, seed=2, level=(3, 5))
        assert len(problems) == 60 and problems == tasks.problems(name, 60, split, 2, (3, 5))
        for problem in problems:
            assert {"problem", "answer", "solution", "task", "level", "id"} <= problem.keys()
            assert problem["task"] == name and 3 <= problem["level"] <= 5
            assert tasks.correct(problem, problem["solution"]) is True
            assert tasks.correct(problem, "I do not know.") is False


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_level_is_a_number_or_a_pair(name):
    assert tasks.problems(name, 20, "train", 0, 4) == tasks.problems(name, 20, "train", 0, (4, 4))


def test_unknown_tasks_and_splits_are_named():
    with pytest.raises(ValueError, match="no built-in task is called 'chess': choose arithmetic"):
        tasks.problems("chess", 1)
    with pytest.raises(ValueError, match="split must be train or test, not 'validation'"):
        tasks.problems("arithmetic", 1, "validation")


def test_a_task_with_a_checker_is_graded_by_it(echo_task):
    problem = tasks.problems("echo", 3, "train", 0, (1, 3))[2]
    assert problem["answer"] == "aaa"
    assert tasks.correct(problem, "banana") and not tasks.correct(problem, r"\boxed{aaaa}")
    assert tasks.correct({"answer": "4"}, "#### 4")         # no task at all: by comparing answers


def test_any_task_of_the_table_is_loaded_by_its_name_and_brings_its_checker(echo_task):
    problems = data.load_problems("echo", "test", 3, (1, 3), 6)
    assert [p["level"] for p in problems] == [1, 2, 3, 1, 2, 3]
    assert "test, 3" in problems[0]["problem"]
    assert [p["check"]("a ba") for p in problems] == [False, True, False, False, True, False]
    plain = data.load_problems("arithmetic", count=5)
    assert plain == arithmetic(5) and "check" not in plain[0]


# -------------------------------------------------------------------------------- prompts and order

def test_templates(tokenizer):
    for template in ("auto", "plain"):
        assert prompts.prompt_text("How many?", tokenizer, template) == "How many?\n"
    text = prompts.prompt_text("How many?", tokenizer, "reasoning")
    assert "<reasoning>" in text and "<answer>" in text and text.endswith("How many?\n")
    with pytest.raises(ValueError, match="no chat template"):
        prompts.prompt_text("How many?", tokenizer, "chat")
    text = prompts.prompt_text("How many?", tokenizer, "r1-zero")
    assert text == f"{prompts.R1_PROMPT} User: How many? Assistant:" and "<think> reasoning process here </think>" in text
    with pytest.raises(ValueError, match="auto, chat, plain or reasoning"):
        prompts.prompt_text("How many?", tokenizer, "r1")


def test_chat_template_where_there_is_one(tokenizer):
    from copy import deepcopy
    chat = deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + prompts.EOS + "{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    expected = (f"<system>{prompts.BOXED_PROMPT}{prompts.EOS}"
                f"<user>How many?{prompts.EOS}<assistant>")
    for template in ("auto", "chat"):
        assert prompts.prompt_text("How many?", chat, template) == expected
    for template, asked in prompts.FORMS.items():
        assert prompts.prompt_text("How many?", chat, template) == expected.replace(prompts.BOXED_PROMPT, asked)
    assert prompts.prompt_text("How many?", chat, "plain") == "How many?\n"


def test_a_base_model_with_a_chat_template_gets_the_plain_question(tokenizer):
    """Qwen's base tokenizers carry the template of their instruct siblings.

    Their own eos does not end its turns."""
    from copy import deepcopy
    base = deepcopy(tokenizer)
    base.chat_template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n"
                          "{{ m.content }}<|im_end|>{% endfor %}")
    assert prompts.prompt_text("How many?", base, "auto") == "How many?\n"
    assert "<|im_start|>" in prompts.prompt_text("How many?", base, "chat")


def test_bos_is_written_once(tokenizer):
    """Plain text gets the tokenizer's bos (Llama); a chat template writes its own."""
    from copy import deepcopy
    from tokenizers.processors import TemplateProcessing
    llama = deepcopy(tokenizer)
    llama.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 5)])
    problem = [{"problem": "How many?"}]
    plain, = prompts.encode_prompts(problem, llama, "plain")
    llama.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    chat, = prompts.encode_prompts(problem, llama, "chat")
    assert plain[0] == 5 and 5 not in plain[1:] and chat[0] != 5


def test_the_date_in_a_template_is_fixed(tokenizer):
    from copy import deepcopy
    dated = deepcopy(tokenizer)
    dated.chat_template = (
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
        "{{ messages[0].content }}")
    assert prompts.prompt_text("How many?", dated, "chat").startswith("26 Jul 2024")


def test_long_prompts_are_dropped_and_counted(tokenizer):
    problems = [{"problem": "x " * n, "answer": "1"} for n in (1, 2, 50)]
    said = []
    kept = prompts.tokenize_prompts(problems, tokenizer, "plain", 20, said.append)
    assert len(kept) == 2 and "dropped 1 of 3" in said[0]
    assert tokenizer.decode(kept[0]["prompt"]) == "x \n"


@given(st.integers(1, 30), st.integers(0, 5), st.lists(st.integers(1, 9), min_size=1, max_size=8))
@settings(deadline=None)
def test_every_epoch_is_a_permutation_and_the_cursor_resumes_it(size, seed, counts):
    problems = list(range(size))
    whole = data.Stream(problems, seed).next(sum(counts))
    stream, pieces = data.Stream(problems, seed), []
    # a fresh stream at every cursor, as after a crash
    for count in counts:
        pieces += stream.next(count)
        stream = data.Stream(problems, seed, stream.cursor)
    assert pieces == whole
    for k in range(0, len(whole) - size + 1, size):
        assert sorted(whole[k:k + size]) == problems


# --------------------------------------------------------------------------------------- tokenizers

@given(st.text(max_size=200))
@settings(deadline=None, max_examples=25)
def test_any_text_survives_the_tokenizer(text):
    tokenizer = prompts.train_tokenizer(["She has 12 shells.\n"], 300)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_tokens_of_their_own(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("She has 1234 shells, 56+7=63")["input_ids"])
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("1234567" "63")


def test_the_tokenizer_is_saved_like_any_other(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = prompts.load_tokenizer(tmp_path)
    text = "Mia has 7 shells."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.eos_token == prompts.EOS
    with pytest.raises(ValueError, match="cannot read its tokenizer"):
        prompts.load_tokenizer(tmp_path / "none")


def test_a_checkpoint_without_tokenizer_files_is_not_given_an_empty_tokenizer(tmp_path):
    shape = ModelConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    Transformer(shape).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot read its tokenizer"):
        prompts.load_tokenizer(tmp_path)


def test_the_stop_set_is_the_union_of_all_sources(tokenizer):
    shape = ModelConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, eos_token_id=7)
    model = Transformer(shape)
    model.files["generation_config.json"] = b'{"eos_token_id": [9, 11]}'
    assert prompts.stop_ids(model, tokenizer) == sorted({7, 9, 11, tokenizer.eos_token_id})


# --------------------------------------------------------------------------------------- warm start

def test_terse_completions_are_the_last_line_and_all_are_correct(tokenizer):
    problems = arithmetic(400, seed=5)
    pairs = sft.corpus(problems, tokenizer, sft.SFTConfig(), terse_share=0.7)
    texts = [tokenizer.decode(c) for _, c in pairs]
    for text, problem in zip(texts, problems):
        assert text.endswith(prompts.EOS)
        assert reward.verify(text.removesuffix(prompts.EOS), problem["answer"])
    assert 0.6 < sum("=" not in t for t in texts) / len(texts) < 0.8


def test_batches_are_full_and_visit_everything_once_an_epoch():
    pairs = [([1] * (1 + i % 7), [2] * (i % 5 + 1)) for i in range(64)]
    seen = [id(pair) for batch in sft.batches(pairs, 4, 16, seed=0) for pair in batch]
    assert len(seen) == 64 and set(seen) == {id(pair) for pair in pairs}


def test_collate_marks_completions_only():
    batch = sft.collate([([5, 6], [7]), ([8], [9, 10, 11])], "cpu")
    assert batch.tokens.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert batch.mask.tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert batch.prompt_lengths.tolist() == [2, 1] and batch.lengths.tolist() == [3, 4]


@pytest.mark.parametrize("shape", [(2, 24, 24), (3, 12, 40), (1, 40, 12)])
def test_orthogonal_keeps_singular_vectors_and_brings_the_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ muon.orthogonal(x) @ v.mT
    diagonal = torch.diagonal(values, dim1=1, dim2=2)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-3
    large = torch.linalg.svdvals(x) > 0.03 * torch.linalg.matrix_norm(x)[:, None]
    assert (diagonal[large] > 0.6).all() and (diagonal < 1.3).all()


def test_muon_moves_all_directions_of_a_matrix_equally_far():
    """The gradient's singular values are as 1 : 0.5 : 0.1; a tall matrix makes longer steps, by sqrt(6 / 3)."""
    w = torch.nn.Parameter(torch.zeros(6, 3))
    w.grad = torch.diag(torch.tensor([1.0, 0.5, 0.1])).repeat(2, 1)
    muon.Muon([w], lr=0.1).step()
    lengths = torch.linalg.svdvals(w.detach()) / (0.1 * 2 ** 0.5)
    assert lengths.min() > 0.6 and lengths.max() < 1.3


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_every_weight_has_one_optimizer(muon_lr):
    model = Transformer(ModelConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2,
    eos_token_id=7))
    optimizer = sft.make_optimizer(model, sft.SFTConfig(muon_lr=muon_lr))
    taken = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, taken)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_supervised_training_lowers_the_loss_and_is_deterministic(tmp_path, muon_lr):
    losses = []
    for name in "ab":
        config = sft.SFTConfig(out=str(tmp_path / name), steps=15, problems=200, hidden_size=32,
                               layers=1, heads=2, muon_lr=muon_lr)
        model, _ = sft.warm_start(config, progress=False)
        losses.append([p.detach().sum().item() for p in model.parameters()])
    assert losses[0] == losses[1]
    problems = arithmetic(200)
    tokenizer = prompts.load_tokenizer(tmp_path / "a")
    batch = sft.collate(sft.corpus(problems, tokenizer, config)[:32], "cpu")
    tokens, mask = batch.tokens, batch.mask
    trained = -model.token_logps(tokens, mask)[0].sum() / mask.sum()
    fresh, _ = sft.build(problems, config)
    assert trained < 0.9 * -fresh.token_logps(tokens, mask)[0].sum() / mask.sum()


def test_a_token_weighs_the_same_in_a_batch_of_terse_solutions():
    """Nine tokens and one, over the five of the mean batch: a token's gradient is 1/5 in both, whatever the normalizer."""
    config = sft.SFTConfig()
    config.batch_tokens = 5.0
    for length in (9, 1):
        batch = sft.collate([([1, 2], [3] * length)], torch.device("cpu"))
        logp = torch.full(batch.mask.shape, -.5, requires_grad=True)
        total, sums = sft.loss(logp, None, batch, config, float(length))
        total.backward()
        torch.testing.assert_close(logp.grad, batch.mask / -5)
        assert total.item() == pytest.approx(.5 * length / 5) and sums["tokens"] == length


def test_files_of_a_mix_that_share_problems_train_on_none_that_is_tested(tmp_path):
    """The second file repeats half of the first: neither train.py nor sft.py learns what is held out of the other."""
    def write(name, numbers):
        rows = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in numbers]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    mix = f"{write('a.jsonl', range(400))},{write('b.jsonl', range(200, 600))}"
    training, held_out = data.load_split(Config(data=mix, eval_problems=80), lambda line: None)
    tested = {p["problem"] for p in held_out}
    assert len(held_out) == 80 and not tested & {p["problem"] for p in training}
    spared = data.load_problems(mix, spare=40)
    out = {p["problem"] for part in mix.split(",") for p in data.hold_out(data.load_problems(part), 40)[1]}
    assert 40 < len(out) <= 80 and {p["problem"] for p in spared} == {f"What is {i} + 1?" for i in range(600)} - out


def test_a_warm_start_on_a_file_never_sees_what_a_run_on_it_is_tested_on(tmp_path, monkeypatch, capsys):
    """sft.py leaves out what train.py holds out of the same file, also of fewer --eval-problems; --hold-out 0 leaves nothing."""
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"problem": f"What is {i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(300)))
    seen = []
    monkeypatch.setattr(sft, "build", lambda problems, config: seen.append({p["problem"] for p in problems}) or 1 / 0)

    def texts(*more):
        with pytest.raises(ZeroDivisionError):
            sft.warm_start(sft.parse(["--data", str(file), "--out", str(tmp_path / "out"), *more]))
        return seen.pop()

    for count in (20, 10):
        training, held_out = data.load_split(Config(data=str(file), eval_problems=count), lambda line: None)
        assert len(held_out) == count and not texts("--hold-out", "20") & {p["problem"] for p in held_out}
    assert len(texts("--hold-out", "20")) == 280 and len(texts()) == 270 and len(texts("--hold-out", "0")) == 300
    with pytest.raises(ValueError, match="--hold-out needs a file"):
        sft.parse(["--data", "arithmetic", "--hold-out", "7", "--out", str(tmp_path / "out")])
