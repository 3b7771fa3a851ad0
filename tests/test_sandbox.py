"The sandbox against programs that misbehave. Each attack is tried for real, on targets that exist."
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from phi4_ref.synth import sandbox
from phi4_ref.synth.sandbox import isolation, passes, passes_many, run_many

run_python = partial(sandbox.run_python, timeout_s=60)  # patience for a loaded machine; the clock has a test of its own

if sys.platform != "linux": pytest.skip("the sandbox's layers are Linux's", allow_module_level=True)


def test_a_good_program_runs():
    result = run_python("import json, re, math, collections, itertools, heapq, decimal, fractions, dataclasses, typing, random\n"
                        "print(json.dumps({'x': math.comb(5, 2), 'in': input()}))\nopen('note.txt', 'w').write('a')\nprint(open('note.txt').read())", stdin="hello\n")
    assert (result.ok, result.stdout, result.stderr, result.timed_out, result.returncode) == (True, '{"x": 10, "in": "hello"}\na\n', "", False, 0)


def test_the_same_program_gives_the_same_output(): assert run_python("print({str(i) for i in range(50)})") == run_python("print({str(i) for i in range(50)})")


def test_everything_is_held_here(): assert isolation() == dict.fromkeys(sandbox.PROBES, True)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "input()\nimport time\ntry:\n  time.sleep(60)\nexcept BaseException:\n  time.sleep(60)",
                                     "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"])
def test_the_clock_stops_it(program):
    start = time.monotonic()
    result = run_python(program, timeout_s=.5, stdin="x\n")
    assert result.timed_out and not result.ok and time.monotonic() - start < 40


def test_it_dies_with_its_parent(tmp_path):
    job = subprocess.Popen([sys.executable, "-c", "from phi4_ref.synth import sandbox\nfrom phi4_ref.synth.sandbox import *\n"
                            f"isolation(); print('go', flush=True); sandbox.SCRATCH = {str(tmp_path)!r}\n"
                            "run_python('import time; time.sleep(50)', timeout_s=50)"], stdout=subprocess.PIPE)
    job.stdout.readline()
    def children(): return Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    def status(pid): return Path(f"/proc/{pid}/status").read_text() if Path(f"/proc/{pid}").exists() else "gone"
    while not (children() and "Seccomp:\t2" in status(children()[0])): time.sleep(.05)
    child = children()[0]
    job.kill(); job.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not ("gone" in status(child) or "zombie" in status(child)): time.sleep(.05)
    assert time.monotonic() < deadline, "the child outlives its parent"


@pytest.mark.parametrize("program, error", [
    ("import os\nwhile True: os.fork()", "PermissionError"),
    ("import subprocess; subprocess.run(['true'])", "PermissionError"),
    ("import os; os.system('true') and 1/0", "ZeroDivisionError"),
    ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
    ("import threading\nthreading.Thread(target=print).start()", "RuntimeError"),
    ("x = bytearray(10**10)", "MemoryError"),
    ("x = [0]\nwhile True: x += x", "MemoryError"),
    ("import mmap; mmap.mmap(-1, 1 << 30)", "OSError"),
    ("open('big', 'wb').write(bytes(1 << 22))", "OSError"),
    ("files = [open(str(i), 'w') for i in range(100)]", "OSError"),
    ("for i in range(10**6): open(str(i), 'w').close()", "OSError"),
    ("for i in range(100): open(str(i), 'wb').write(bytes(1 << 20))", "OSError"),
    ("def f(): f()\nf()", "RecursionError"),
    ("import os; os.kill(os.getppid(), 15)", "PermissionError"),
    ("import os; os.listdir('/proc')", "PermissionError"),
    ("import os; os.listdir('..')", "PermissionError"),
    ("open('../program.py').read()", "PermissionError"),
    ("import os; os.symlink('/etc', 'e'); os.listdir('e')", "PermissionError"),
    ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "ValueError"),
    ("import ctypes; 1 / (ctypes.CDLL(None).unshare(0x10000000) + 1)", "ZeroDivisionError"),
    ("import ctypes; 1 / (ctypes.CDLL(None).mount(b'x', b'.', b'tmpfs', 0, 0) + 1)", "ZeroDivisionError"),
    ("import ctypes; 1 / (ctypes.CDLL(None).ptrace(16, 1, 0, 0) + 1)", "ZeroDivisionError"),
    ("import numpy", "ModuleNotFoundError"),
    ("def f(:", "SyntaxError"),
    ("\0", "null bytes"),
])
def test_what_it_must_not_do_fails(program, error):
    result = run_python(program)
    assert not result.ok and error in result.stderr.splitlines()[-1], result


def test_a_crash_of_the_interpreter_is_a_failure():
    result = run_python("import sys; sys.setrecursionlimit(10**9)\nclass A:\n  def __repr__(self): return repr(self)\nrepr(A())")
    assert not result.ok and not result.timed_out
    result = run_python("import ctypes; ctypes.string_at(1)")
    assert (result.ok, result.returncode) == (False, -signal.SIGSEGV)


@pytest.mark.parametrize("program, ok, status", [("import sys; sys.exit()", True, 0), ("import sys; sys.exit(3)", False, 3), ("raise SystemExit('bye')", False, 1),
                                                 ("import os; os._exit(7)", False, 7), ("1/0", False, 1)])
def test_exit_codes(program, ok, status):
    result = run_python(program)
    assert (result.ok, result.returncode) == (ok, status)


def test_output_is_capped_and_decoded():
    result = run_python("import sys\nwhile True: print('x' * 1000); print('y' * 1000, file=sys.stderr)")
    assert not result.ok and len(result.stdout) <= 1 << 20 and len(result.stderr) <= 1 << 20
    result = run_python("import sys; sys.stdout.buffer.write(b'a\\xff\\xfe\\x00b')")
    assert result.ok and result.stdout == "a\ufffd\ufffd\0b"
    assert run_python("print('caf\u00e9 \ud800'[:4])").stdout == "caf\u00e9\n"


def test_no_secret_in_its_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    result = run_python("import os; print(dict(os.environ))\ntry: print(open(f'/proc/{os.getppid()}/environ').read())\nexcept OSError: pass")
    assert result.ok and "secret" not in result.stdout and "HOME" not in result.stdout


def test_no_file_of_ours_can_be_read_written_or_deleted(tmp_path):
    secret = tmp_path / "secret.txt"; secret.write_text("key"); secret.chmod(0o666); tmp_path.chmod(0o777)
    for line in [f"print(open({str(secret)!r}).read())", f"open({str(secret)!r}, 'w')", f"import os; os.remove({str(secret)!r})", f"import os; os.truncate({str(secret)!r}, 0)",
                 f"import os; os.rename({str(secret)!r}, 'x')", f"import os; os.link({str(secret)!r}, 'x')", f"import shutil; shutil.rmtree({str(tmp_path)!r})",
                 f"open({str(tmp_path / 'new')!r}, 'w')"]:
        result = run_python(line)
        assert not result.ok and "Error" in result.stderr and "key" not in result.stdout, (line, result)
    assert secret.read_text() == "key" and list(tmp_path.iterdir()) == [secret]


def test_no_connection_leaves():
    met = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: met.append(server.accept()), daemon=True).start()
        for line in [f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)", "import socket; socket.socket(socket.AF_UNIX)",
                     "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))", "import socket; socket.getaddrinfo('example.com', 80)"]:
            assert not run_python(line).ok, line
        time.sleep(.1)
    assert not met


def test_nothing_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SCRATCH", str(tmp_path))
    run_python("import os\nos.makedirs('a/' * 50)\nos.chmod('a', 0)\nopen('b', 'w').write('x')")
    run_python("while True: pass", timeout_s=.2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code, good", [("def f(x): return x + 1", True), ("def f(x): return x", False), ("def f(x): return 2\nimport sys; sys.exit()", False),
                                        ("def f(x): return 2\nimport os; os._exit(0)", False), ("def f(x): return 2\nraise SystemExit", False),
                                        ("def f(x): return x + 1\nprint('noise', end='')", True), ("import atexit; atexit.register(print, 'late'); f = lambda x: x + 1", False)])
def test_tests_are_passed_only_at_their_end(code, good): assert passes(code, "assert f(1) == 2\nassert f(5) == 6") is good


def test_many_keep_their_order():
    assert [r.stdout for r in run_many([f"print({i})" for i in range(12)])] == [f"{i}\n" for i in range(12)]
    assert passes_many([("x = 1", "assert x == 1"), ("x = 1", "assert x == 2")]) == [True, False] and run_many([]) == []


def test_where_the_network_is_open_it_refuses(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: dict.fromkeys(sandbox.PROBES, False))
    with pytest.raises(RuntimeError, match="PHI4_REF_SANDBOX=limits-only"): run_python("print(1)")
    monkeypatch.setenv("PHI4_REF_SANDBOX", "limits-only")
    assert run_python("print(1)").stdout == "1\n"


@pytest.mark.parametrize("settings", [dict(timeout_s=0), dict(memory_mb=1)])
def test_impossible_limits_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))): run_python("pass", **settings)


@pytest.mark.parametrize("kept", ["filter_syscalls", "enter_namespaces"])
def test_either_layer_alone_keeps_it_off_the_network(monkeypatch, kept):
    child = sandbox.CHILD
    for layer in {"enter_namespaces(libc)", "restrict_files(libc, library)", "filter_syscalls(libc, denied)"}:
        if not layer.startswith(kept): child = child.replace(f"        {layer}\n", "")
    monkeypatch.setattr(sandbox, "CHILD", child)
    held = isolation.__wrapped__()
    assert held["network"] and held["new processes"] == (kept == "filter_syscalls" or os.getuid() != 0)
