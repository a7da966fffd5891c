"""Programs as completions: what passes, what never does, and what the sandbox keeps from a program."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from keel.errors import KeelError
from keel.rewards.code import CodeGrader, Printed, Returned, fenced, program_in, read_tests, same_value
from keel.rewards.sandbox import Limits, Sandbox, _shown, available
from keel.tasks.task import get_task
from keel.types import Prompt

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs resource limits and process groups")
QUICK = Sandbox(Limits(wall_s=8.0))
GRADER = CodeGrader(QUICK)
ADD = Prompt("add", "Write add.", "assert add(1, 2) == 3\nassert add(-1, 1) == 0\nassert add(2, 2) == 4")
ECHO = Prompt("echo", "Print the sum of two numbers.", '[{"stdin": "1 2\\n", "stdout": "3\\n"}, {"stdin": "5 5", "stdout": "10"}]')
SUM = "a, b = map(int, input().split())\nprint(a + b)"


def run(program, sandbox=QUICK, **more):
    return sandbox.run({"main.py": program}, "main.py", **more)


# ---- verdicts --------------------------------------------------------------------------------------------------------


def test_right_programs():
    assert GRADER(ADD, fenced("def add(a, b):\n    return a + b")).value == 1.0
    assert GRADER(ECHO, "First I think.\n" + fenced(SUM)).correct
    assert GRADER(ADD, fenced("def add(a, b):\n    print('noise')\n    return float(a + b)")).value == 1.0


def test_a_share_of_the_tests():
    part = CodeGrader(QUICK, "fraction")(ADD, fenced("def add(a, b):\n    return 3 if a == 1 else 0"))
    assert part.value == pytest.approx(2 / 3) and not part.correct and part.parts == {"test.passed_frac": part.value}
    assert GRADER(ADD, fenced("def add(a, b):\n    return 3")).value == 0.0


CHEATS = {
    "exit_0": "import sys\nsys.exit(0)",
    "os_exit_0": "import os\nos._exit(0)",
    "exit_in_the_call": "def add(a, b):\n    raise SystemExit(0)",
    "marker": "print('ALL TESTS PASSED')\nprint('3 passed in 0.01s')",
    "nothing": "pass",
    "answers_before_it_is_asked": (
        "import os, json\nfor fd in range(3, 64):\n    for n, v in enumerate((3, 0, 4)):\n        try:\n"
        "            os.write(fd, (json.dumps({'number': n, 'value': v}) + '\\n').encode())\n        except OSError: pass\n"
        "def add(a, b):\n    return a + b"
    ),
    "equal_to_all": "class Yes:\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Yes()",
    "an_int_of_its_own": "class Yes(int):\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Yes(3)",
    "patches_json": 'import json\njson.dumps = lambda *a, **k: \'{"number": 0, "value": 3}\'\ndef add(a, b):\n    return 0',
    "patches_the_driver": "import sys\nsys.modules['__main__'].plain = lambda *a: True\ndef add(a, b):\n    return 0",
    "looks_for_the_answers": (
        "import sys\ndef add(a, b):\n    frame = sys._getframe()\n    while frame:\n"
        "        for name, value in frame.f_locals.items():\n"
        "            if 'expected' in name: return value\n        frame = frame.f_back\n    return None"
    ),
    "kills_its_supervisor": "import os\nfor pid in (os.getppid(), -1):\n    try: os.kill(pid, 9)\n    except OSError: pass",
    "kills_itself": "import os\nos.kill(os.getpid(), 9)",
    "takes_all_memory": "x = bytearray(2 << 30)",
    "floods": "import os\nwhile True: os.write(2, b'x' * 65536)",
    "syntax": "def add(a, b:",
    "true_for_one": "def add(a, b):\n    return {3: True, 0: False}.get(a + b, 4)",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_score_nothing(name):
    score = GRADER(ADD, fenced(CHEATS[name]))
    if name == "true_for_one":  # True is no 1, and 3 is not True
        score = GRADER(Prompt("p", "", "assert add(0, 1) == 1"), fenced("def add(a, b):\n    return True"))
    assert score.value == 0.0 and not score.correct and score.reason, "a program cannot make itself unscorable either"


@pytest.mark.parametrize("name", ["exit_0", "os_exit_0", "marker", "nothing"])
def test_cheats_at_printing(name):
    assert GRADER(ECHO, fenced(CHEATS[name])).value == 0.0
    assert GRADER(ECHO, fenced(SUM + "\nraise SystemExit(1)")).value == 0.0, "the right output and a failing exit is no pass"


def test_no_program():
    for text in ("", "add = 3", "```\n", "```cpp\nint add;\n```"):
        assert GRADER(ADD, text).value == 0.0
    assert program_in("```python\nold\n```\nbetter:\n~~~py\nnew\n~~~\n```text\nout\n```") == "new\n"


def test_a_sandbox_that_cannot_start_is_unscorable(monkeypatch):
    strict = CodeGrader(Sandbox(require="full"))
    monkeypatch.setattr("keel.rewards.sandbox._found", {"here": "bare"})
    score = strict(ADD, fenced("def add(a, b):\n    return a + b"))
    assert score.value is None and "'full' is required" in score.reason
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(OSError):
        open("/nowhere/x")
    assert GRADER(ADD, fenced("def add(a, b):\n    return a + b")).value is None


def test_many_are_one_by_one():
    asked = [(ADD, fenced(f"def add(a, b):\n    return a + b + {i % 2}")) for i in range(6)]
    assert GRADER.many(asked) == [GRADER(*each) for each in asked]


def test_values():
    assert same_value([1, [2.0]], (1, [2])) and same_value(0.1 + 0.2, 0.3) and same_value({"set": [2, 1]}, {1, 2})
    assert same_value({"dict": [["a", 1]]}, {"a": 1}) and same_value(None, None) and same_value(10**400, 10**400)
    nan = float("nan")
    wrong = [(1, True), (True, 1), ("1", 1), (nan, nan), ([1], [1, 1]), ({"set": [1, 1]}, {1, 2}), (10**400, 1.5), (None, 0)]
    wrong += [({"dict": [["a", 1], ["a", 1]]}, {"a": 1, "b": 2}), ({"value": 3}, 3)]
    for found, expected in wrong:
        assert not same_value(found, expected), (found, expected)


def test_arguments_arrive_as_they_were():
    prompt = Prompt("p", "", "assert kind((1, 2), {3}, x={'a': (4,)}) == ['tuple', 'set', 'tuple']")
    assert GRADER(prompt, fenced("def kind(a, b, x):\n    return [type(v).__name__ for v in (a, b, x['a'])]")).correct


# ---- reading tests ---------------------------------------------------------------------------------------------------


def test_tests_are_read():
    lines = "assert f(1) == 2\nassert [3] == f(x=-1)\nassert f()\nassert not f(2)\nassert f(0) is None"
    assert read_tests(lines, "here") == [
        Returned("f", 2, (1,)),
        Returned("f", [3], (), {"x": -1}),
        Returned("f", True),
        Returned("f", False, (2,)),
        Returned("f", None, (0,)),
    ]
    assert read_tests('[{"call": "f", "args": [1], "returns": [2]}, "assert f(1) == 2"]', "here")[0] == Returned("f", [2], (1,))
    assert read_tests('{"stdin": "a", "stdout": "b"}', "here") == [Printed("a", "b")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("[]", "empty"),
        ("assert f(1) ==", "no Python"),
        ("import os", "only lines"),
        ("assert f(g(1)) == 2", "out of a program's reach"),
        ("assert f(1) == g(2)", "out of a program's reach"),
        ("assert f(1) > 2", "calls no function"),
        ("[{]", "no JSON"),
        ('[{"stdin": "a"}]', "keys stdin and stdout"),
        ('[{"call": "f", "args": 1, "returns": 2}]', "keys stdin and stdout"),
    ],
)
def test_tests_that_cannot_be(text, said):
    with pytest.raises(KeelError, match=said):
        read_tests(text, "here")


# ---- the sandbox -----------------------------------------------------------------------------------------------------


def test_how_programs_end():
    assert (run("print(input())", stdin=b"hi").output, run("raise SystemExit(3)").status) == (b"hi\n", 3)
    killed = run("import os\nos.kill(os.getpid(), 9)")
    assert killed.ended == "signal" and killed.status == -9
    assert b"ZeroDivisionError" in run("1/0").errors
    assert run("print(1)").isolation == available()


def gone(folder):
    return not [place for place in Path(folder).glob("keel-sandbox-*")]


ENDLESS = {
    "spins": "while True: pass",
    "sleeps": "import time\ntime.sleep(60)",
    "ignores_signals": "import signal, time\nfor s in (15, 1, 2): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
    "forks_away": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\ntime.sleep(60)",
    "closes_output": "import os, time\nos.close(1); os.close(2)\ntime.sleep(60)",
    "closes_input": "import sys\nsys.stdin.close()\nwhile True: pass",
}


@pytest.mark.parametrize("program", ENDLESS.values(), ids=ENDLESS)
def test_time_ends_it(program, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    begun = time.monotonic()
    ran = run(program, Sandbox(Limits(wall_s=1.0)), stdin=b"x" * 1_000_000)
    assert ran.ended == "time" and time.monotonic() - begun < 1.0 + 1.0
    assert gone(tmp_path)


def test_limits_hold():
    assert b"MemoryError" in run("x = bytearray(2 << 30)").errors
    ran = run("while True: pass", Sandbox(Limits(wall_s=8.0, cpu_s=1)))
    assert ran.ended == "signal" and ran.seconds < 6
    ran = run("import os\nwhile True: os.write(1, b'x' * 65536)")
    assert ran.ended == "output" and len(ran.output) < 512 * 1024
    ran = run("f = open('/tmp/big', 'wb')\nfor _ in range(100): f.write(b'x' * (1 << 20))")
    assert ran.status != 0
    for bad in ({"wall_s": 0.0}, {"cpu_s": -1}, {"wall_s": float("nan")}):
        with pytest.raises(KeelError, match="above 0"):
            Limits(**bad)


@pytest.mark.skipif(available() != "full", reason=f"this system offers {available()!r} isolation only")
def test_what_a_program_cannot_reach(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the expected output")
    os.environ["KEEL_TEST_KEY"] = "a key"
    try:
        ran = run(f"""
import os, socket
print(os.path.exists({str(secret)!r}), os.path.exists('/etc/passwd'), os.path.exists('/proc/1'), sorted(os.listdir('/tmp')))
print('KEEL_TEST_KEY' in os.environ, len(os.environ))
for place in ('/x', '/work/main.py', os.__file__, '/usr/x'):
    try:
        open(place, 'a'); print('wrote', place)
    except OSError: pass
for address in (('127.0.0.1', {_listening()}), ('1.1.1.1', 53)):
    try:
        socket.create_connection(address, timeout=1); print('connected', address)
    except OSError: pass
open('/tmp/mine', 'w').write('allowed'); print(sorted(os.listdir('/tmp')))
""")
    finally:
        del os.environ["KEEL_TEST_KEY"]
    python = {Path(place).parts[2] for place in _shown(packages=False) if place.startswith("/tmp/")}  # an interpreter under /tmp
    seen = [f"False False False {sorted(python)}", "False 8", str(sorted({"mine"} | python))]
    assert ran.output.decode().splitlines() == seen, (ran.output, ran.errors)


def _listening():
    import socket

    global _SERVER
    _SERVER = socket.create_server(("127.0.0.1", 0))
    return _SERVER.getsockname()[1]


@pytest.fixture(autouse=True)
def _close():
    yield
    if "_SERVER" in globals():
        globals().pop("_SERVER").close()


@pytest.mark.skipif(available() != "full", reason=f"this system offers {available()!r} isolation only")
def test_a_fork_bomb_ends_with_its_program():
    begun = time.monotonic()
    bomb = (
        "import os, time\nn = 0\ntry:\n  while True:\n    if os.fork() == 0: time.sleep(60)\n    n += 1\nexcept OSError: print(n)"
    )
    ran = run(bomb)
    assert ran.ended == "exit" and 0 < int(ran.output) <= 16 and time.monotonic() - begun < 8


def test_packages_where_they_are_asked_for():
    assert run("import numpy").status == 1
    ran = run("import numpy; print(numpy.arange(3).sum())", Sandbox(Limits(wall_s=20.0, memory_mb=2048), packages=True))
    assert ran.output == b"3\n", ran.errors[-300:]


def test_no_descriptor_and_no_process_is_left():
    run("print(1)")
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for _ in range(3):
        run("import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(60)")
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == before
        mine = f"PPid:\t{os.getpid()}\n"
        assert not [
            p for p in Path("/proc").glob("[0-9]*/status") if mine in _text(p) and "sandbox" in _text(p.with_name("cmdline"))
        ]


def _text(path):
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# ---- as the reward of a task -----------------------------------------------------------------------------------------


def test_a_task_of_programs(tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"Add {i}.", "test_list": [f"assert add(1) == {1 + i}"], "code": f"def add(a):\n    return a + {i}"}
        for i in range(12)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = get_task(f"jsonl:{rows}?grader=code&answer=test_list&solution=code&wall_s=8")
    prompt = task.train[0]
    assert task.reward(prompt, task.gold(prompt), "stop").value == 1.0
    with pytest.raises(KeelError, match="does not score"):
        rows.write_text(rows.read_text().replace("a + 3", "a - 3"))
        get_task(f"jsonl:{rows}?grader=code&answer=test_list&solution=code&wall_s=8")
    with pytest.raises(KeelError, match="verdict='most'"):
        get_task(f"jsonl:{rows}?grader=code&answer=test_list&verdict=most")
    with pytest.raises(KeelError, match="only lines"):
        rows.write_text('{"prompt": "a", "answer": "import os"}\n{"prompt": "b", "answer": "import os"}')
        get_task(f"jsonl:{rows}?grader=code")
