"""Chat templates: programs that come with a checkpoint, run where they can do no harm.

A chat template turns a conversation into text. It is a small program in Jinja, written by the
checkpoint's author, and so untrusted. Jinja's sandbox keeps it away from files, but bounds neither
time nor memory: two nested loops over range(99999) take hours, "a" * 10**10 takes ten gigabytes.
Counting steps would not do, because one step may be as long as the program likes. So templates run
in a process of their own, to which the system gives a few seconds and, but for macOS, a gigabyte:

    render(template, conversations, variables)   ->   python chat.py  (a JSON object in, one out)

The texts are those of transformers' tokenizer.apply_chat_template, whose extensions of Jinja are
repeated here: importing them takes longer than all the rest. The one difference is that today's
date is always the same, which keeps runs repeatable. prompts.py is the only caller. The process
needs jinja2 and nothing else.
"""
import json
import resource
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

SECONDS = 5                 # of CPU for one call, and a millisecond more for each conversation
MEMORY_BYTES = 2 ** 30      # of the process, Python and input included
MOST_CHARACTERS = 10 ** 6   # of a text, beyond twenty times the conversation's own
TODAY = datetime(2024, 7, 26)


def render(template, conversations, variables):
    """Returns the text of each conversation, a list of messages {"role", "content"}.

    variables: {name: scalar}, what the template may read beside the messages. Raises ValueError,
    one line, when the template fails, or takes more time, memory or characters than it may."""
    seconds = SECONDS + len(conversations) // 1000
    job = json.dumps({"template": template, "conversations": conversations,
                      "variables": variables, "seconds": seconds})
    try:
        done = subprocess.run([sys.executable, str(Path(__file__).resolve())], input=job.encode(),
                              capture_output=True, timeout=12 * seconds)
    except subprocess.TimeoutExpired:       # it waited, or the machine is very busy
        raise ValueError(f"it takes more than {12 * seconds} seconds") from None

    if done.returncode == -signal.SIGXCPU:
        raise ValueError(f"it takes more than {seconds} seconds")
    if done.returncode < 0:                 # the stack has overflowed, or the system needs memory
        raise ValueError(f"it nests too deep, or takes too much (signal {-done.returncode})")
    if done.returncode > 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(lines[-1][:200] if lines else f"exit code {done.returncode}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["texts"]


# ------------------------------------------------------------------------- the process of its own

def main():
    """Read a job from stdin and write its texts, or what went wrong, to stdout."""
    job = json.load(sys.stdin)
    limit(job)

    try:
        texts = answer_of(job)
        sys.stdout.write(json.dumps({"texts": texts}))
    except MemoryError:
        texts = None        # room for the line that says so
        sys.stdout.write(json.dumps({"error": f"it takes more than {MEMORY_BYTES >> 20} MB"}))
    except Exception as error:      # a template is a program: it may fail in any way
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        sys.stdout.write(json.dumps({"error": reason}))


def limit(job):
    """Bound the memory and the seconds of this process. macOS refuses a bound of memory."""
    if sys.platform != "darwin":
        room = MEMORY_BYTES + 20 * len(json.dumps(job["conversations"]))
        lower(resource.RLIMIT_AS, room)
    lower(resource.RLIMIT_CPU, job["seconds"])


def lower(kind, value):
    """Lower a limit of this process, unless the system has set a lower one."""
    hard = resource.getrlimit(kind)[1]
    if hard == resource.RLIM_INFINITY or value < hard:
        resource.setrlimit(kind, (value, hard))


def answer_of(job):
    """Returns the texts of a job's conversations. Raises ValueError for one that is too long."""
    template = environment().from_string(job["template"])
    texts = []
    for messages in job["conversations"]:
        text = template.render(messages=messages, **job["variables"])
        most = MOST_CHARACTERS + 20 * len(json.dumps(messages))
        if len(text) > most:
            raise ValueError(f"it writes more than {most} characters")
        texts.append(text)
    return texts


def environment():
    """Returns the Jinja environment that transformers gives to chat templates."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what the assistant says, for masks; here it only passes it on."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            call = self.call_method("said")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def said(self, caller):
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Jinja's, without names that lead to Python's insides."""

        def __init__(self, *args, **values):
            for name in dict(*args, **values):
                refuse_hidden(name)
            super().__init__(*args, **values)

        def __setitem__(self, name, value):
            refuse_hidden(name)
            super().__setitem__(name, value)

    def refuse_hidden(name):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")

    def new_dict(*args, **values):
        return dict(*args, **values)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own escapes the signs of HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=[Generation, loopcontrols])
    found.filters["tojson"] = tojson
    found.globals.update(raise_exception=raise_exception, strftime_now=TODAY.strftime,
                         namespace=Namespace, dict=new_dict)
    return found


if __name__ == "__main__":
    main()
