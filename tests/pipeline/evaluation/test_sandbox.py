"""Nothing gets out of the sandbox, nothing in it goes on without end, and nothing of it is left behind."""

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.evaluation import sandbox
from pipeline.evaluation.sandbox import MIB, Outcome, Sandbox
from pipeline.evaluation.syscalls import ALLOWED
from schemas.errors import UserError
from tests.pipeline.evaluation.attacks import CALLS, FILES, FORKS, GREED, NETWORK, PRELUDE, PROCESSES, STUBBORN, Attack

ROOT = Path(__file__).resolve().parents[3]
SECRET = "the-secret-of-the-test"
MEMORY, DISK, OUTPUT = 512 * MIB, 16 * MIB, 64 << 10
NO_FILTER = struct.pack("HBBI", 6, 0, 0, 0x7FFF0000)  # one instruction: every call is allowed


def made(seconds: float = 30, **limits: Any) -> Sandbox:
    """A sandbox; the test is skipped where bubblewrap by itself can do nothing, and nowhere else."""
    bare = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    if shutil.which("bwrap") is None or subprocess.run(bare, capture_output=True).returncode or not numbers():
        pytest.skip("no bubblewrap or libseccomp that works here, so generated programs are never run")
    return Sandbox(seconds, **{"memory": MEMORY, "disk": DISK, "output": OUTPUT, **limits})


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return made()


@pytest.fixture(scope="module", params=["as it is", "namespaces alone", "user namespace"])
def any_box(request: pytest.FixtureRequest) -> tuple[str, Sandbox]:
    """The sandbox, the same without its filter of system calls, and as it is where root does not start it."""
    found = made()
    if request.param == "namespaces alone":
        found.rules = NO_FILTER
    if request.param == "user namespace":
        if not found.root:
            pytest.skip("it is the first one where root does not start it")
        found.root = False
    return request.param, found


class Servers:
    """Listens by TCP, UDP and two kinds of Unix socket, and counts who comes."""

    def __init__(self, folder: Path):
        self.calls = 0
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        udp = socket.socket(type=socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", self.port))
        self.unix, self.abstract = str(folder / "s"), f"\0tokensift-{os.getpid()}"
        sockets = [self.tcp, udp]
        for name in (self.unix, self.abstract):
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(name)
            listening.listen()
            sockets.append(listening)
        for one in sockets:
            threading.Thread(target=self._serve, args=(one,), daemon=True).start()

    def _serve(self, one: socket.socket) -> None:
        while True:
            if one.type == socket.SOCK_DGRAM:
                caller = one.recvfrom(16)[1]
                self.calls += 1
                one.sendto(b"y", caller)
            else:
                call, _ = one.accept()
                self.calls += 1
                with call, suppress(OSError):  # who only wanted to know whether we listen is gone
                    call.sendall(b"HTTP/1.0 200 OK\r\n\r\n")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Servers:
    return Servers(tmp_path_factory.mktemp("s"))


def mounted() -> list[str]:
    """What is mounted, but for the network namespaces in which other tests beside these have their nodes."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if " /run/netns" not in line]


@pytest.fixture(scope="module")
def aim(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What attacks know of the world outside, as the lines of Python before them; after them the world is as it was."""
    secret = tmp_path_factory.mktemp("secret") / "file"
    secret.write_text(SECRET)
    witness = subprocess.Popen(["sleep", "1000"])
    memory = ctypes.create_string_buffer(b"memory")
    os.environ["SANDBOX_TEST_SECRET"] = SECRET
    names = {
        "SECRET": str(secret), "HOME": str(Path.home()), "REPOSITORY": str(ROOT), "PARENT": os.getpid(),
        "PARENT_GROUP": os.getpgrp(), "PARENT_ADDRESS": ctypes.addressof(memory), "PORT": servers.port,
        "UNIX": servers.unix, "ABSTRACT": servers.abstract, "MEMORY": MEMORY, "DISK": DISK, "NUMBERS": numbers(),
        "SOMETHING_READ_ONLY": "/packages/numpy/__init__.py",
    }  # fmt: skip
    mounts, descriptors = mounted(), open_files()
    yield "".join(f"{name} = {value!r}\n" for name, value in names.items())
    assert witness.poll() is None
    witness.kill()
    witness.wait()
    assert secret.read_text() == SECRET
    assert mounted() == mounts
    assert open_files() <= descriptors + 1
    del os.environ["SANDBOX_TEST_SECRET"]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def numbers() -> dict[str, int]:
    """Numbers of system calls on this architecture."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return {}  # the sandbox will say so
    found = {name: library.seccomp_syscall_resolve_name(name.encode()) for name in CALLS}
    return {name: number for name, number in found.items() if number >= 0}


def lives(box: Sandbox, aim: str, attack: Attack) -> Outcome:
    """Run an attack, and see that it got nothing, ended in a way it may, and left no process."""
    outcome = box.run(PRELUDE + aim + attack.code + "\nprint('tried', flush=True)\n", "input\n")
    said = outcome.stdout + outcome.stderr
    assert "ESCAPED" not in said
    assert SECRET not in said
    assert outcome.reason in attack.ends, said
    assert outcome.reason or "tried" in outcome.stdout or len(outcome.stdout) == OUTPUT, said
    assert (
        max(len(outcome.stdout.encode()), len(outcome.stderr.encode())) <= 3 * OUTPUT
    )  # three bytes for one of no text
    children = [child.as_dict(["cmdline"]) for child in psutil.Process().children(recursive=True)]
    assert "program.py" not in str(children)  # of all that a sandbox starts it is in the command line
    return outcome


def named(attacks: list[Attack]) -> Any:
    return pytest.mark.parametrize("attack", attacks, ids=[attack.name for attack in attacks])


@named([*FILES, *PROCESSES, *NETWORK])
def test_an_attack_from_within_gets_nothing(
    any_box: tuple[str, Sandbox], aim: str, servers: Servers, attack: Attack
) -> None:
    kind, box = any_box
    if kind == "namespaces alone" and not attack.namespaces:
        pytest.skip("the filter alone holds it")
    calls = servers.calls
    lives(box, aim, attack)
    assert servers.calls == calls


@named([*FORKS, *GREED])
def test_greed_ends_at_the_limits(any_box: tuple[str, Sandbox], aim: str, attack: Attack) -> None:
    kind, box = any_box
    if kind == "namespaces alone" and not attack.namespaces:
        pytest.skip("the filter alone holds it")
    if kind == "user namespace" and "thread" in attack.name:
        pytest.skip("the kernel does not count the threads of root, who starts this one only here")
    lives(box, aim, attack)


@named(STUBBORN)
def test_whatever_does_not_end_is_ended(aim: str, attack: Attack) -> None:
    lives(made(1 if "time" in attack.ends else 30), aim, attack)  # a busy machine takes a second to begin


@named([attack for attack in [*FILES, *PROCESSES, *NETWORK] if attack.plain])
def test_the_attack_is_sound_since_outside_it_succeeds(aim: str, attack: Attack) -> None:
    found = subprocess.run([sys.executable, "-c", PRELUDE + aim + attack.code], capture_output=True, text=True)
    assert "ESCAPED" in found.stdout, found.stdout + found.stderr


def test_there_are_enough_attacks_and_each_has_a_name_of_its_own() -> None:
    names = [attack.name for attack in (*FILES, *PROCESSES, *FORKS, *NETWORK, *GREED, *STUBBORN)]
    assert len(set(names)) == len(names) >= 100


def test_calls_that_no_program_needs_do_not_exist_and_those_it_needs_do(box: Sandbox, aim: str) -> None:
    assert not set(CALLS) & set(ALLOWED)
    code = """
import errno
for name, number in NUMBERS.items():
    ctypes.set_errno(0)
    if libc.syscall(number, -1, -1, -1, -1, -1, -1) != -1 or ctypes.get_errno() != errno.ENOSYS:
        print('ESCAPED:', name, ctypes.get_errno())
print(len(NUMBERS), libc.getpid())
"""
    outcome = box.run(PRELUDE + aim + code)
    assert outcome.ok, outcome
    assert outcome.stdout == f"{len(numbers())} 2\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="calls of 32-bit programs are x86's")
@pytest.mark.parametrize("call", ["b814000000cd80c3", "b827000040 0f05c3"], ids=["int 0x80", "x32"])
def test_calls_by_another_architectures_table_end_the_process(box: Sandbox, call: str) -> None:
    code = f"""
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("{call}"))
print("ESCAPED", ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))(), flush=True)
"""
    outcome = box.run(code)
    assert outcome.reason in ("signal SIGSYS", "signal SIGSEGV"), outcome


def test_a_daemon_that_the_filter_would_have_refused_ends_with_its_program() -> None:
    box = made(disk=7_654_321)  # in the command line of each of its processes
    box.rules = NO_FILTER
    code = """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        print("daemon", flush=True)
        time.sleep(1000)
    os._exit(0)
time.sleep(0.3)
"""
    outcome = box.run(code)
    assert outcome.ok
    assert "daemon" in outcome.stdout
    assert outcome.seconds < 20
    assert not of_disk(7_654_321)


def of_disk(size: int) -> list[psutil.Process]:
    """Living processes of a sandbox, known by the size of its folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if str(size) in " ".join(process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def test_a_sandbox_ends_with_the_process_that_started_it() -> None:
    made()
    code = f"from pipeline.evaluation.sandbox import Sandbox; Sandbox(1000, disk=7_654_333).run({'import time; time.sleep(1000)'!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until(lambda: len(of_disk(7_654_333)) >= 3)  # two of bubblewrap, and the program's
    time.sleep(0.5)  # by now it has most likely told its parent that it began
    process.kill()
    process.wait()
    wait_until(lambda: not of_disk(7_654_333))


def wait_until(holds: Any) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    pytest.fail("never came true")


def test_a_program_reads_its_input_says_its_output_and_its_status(box: Sandbox) -> None:
    outcome = box.run("import sys\nprint(input(), 'naïve ∑')\nprint('oh', file=sys.stderr)\nsys.exit(3)", "line\n")
    assert (outcome.stdout, outcome.stderr, outcome.ok, outcome.reason) == ("line naïve ∑\n", "oh\n", False, "exit 3")
    done = box.run("exit()")
    assert (done.stdout, done.stderr, done.ok, done.reason) == ("", "", True, "")
    assert 0 <= done.seconds < 30


def test_an_errors_last_line_is_pythons_own_and_the_program_is_main(box: Sandbox) -> None:
    outcome = box.run("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nprint(__name__, A(1))\n1 / 0")
    assert outcome.stdout == "__main__ A(x=1)\n"
    assert outcome.stderr.endswith('  File "program.py", line 6, in <module>\nZeroDivisionError: division by zero\n')
    assert "NameError: name 'os' is not defined" in box.run("os").stderr
    assert "SyntaxError" in box.run("def f(:").stderr
    assert box.run("a\0b").reason == "exit 1"
    assert box.run("print('\udc80')").reason == ""


def test_packages_can_be_imported_or_left_out(box: Sandbox) -> None:
    code = "import numpy, sympy\nprint(numpy.linalg.det([[2.0]]), sympy.factor(sympy.Symbol('x') ** 2 - 1))"
    assert box.run(code).stdout == "2.0 (x - 1)*(x + 1)\n"
    assert "ModuleNotFoundError" in made(packages=None).run("import numpy").stderr


def test_a_program_says_the_same_each_time(box: Sandbox) -> None:
    code = "print({'a', 'b', 'c', 'd', 'e'}, hash('x'))"
    assert box.run(code).stdout == box.run(code).stdout != ""


def test_programs_run_side_by_side_and_keep_apart(box: Sandbox) -> None:
    code = "import time\nopen('mine', 'x').write(input())\ntime.sleep(0.2)\nprint(open('mine').read())"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: box.run(code, str(number)).stdout, range(24)))
    assert found == [f"{number}\n" for number in range(24)]


def test_without_bubblewrap_or_libseccomp_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"bubblewrap.*apt-get install"):
        patch.setenv("PATH", str(tmp_path))
        Sandbox()
    made()
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"libseccomp.*apt-get install"):
        patch.setattr(sandbox.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
        Sandbox()


def test_where_the_kernel_forbids_namespaces_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made()
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"No permissions to create new namespace.*sysctl"):
        Sandbox()


def test_root_of_a_container_that_knows_no_other_user_has_a_sandbox_too() -> None:
    made()
    code = "from pipeline.evaluation.sandbox import Sandbox; box = Sandbox(); print(box.root, box.run('print(6 * 7)').stdout)"
    contained = ["unshare", "--user", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*contained, "true"], capture_output=True).returncode:
        pytest.skip("no user namespace within this one")
    found = subprocess.run([*contained, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "False 42\n\n", found.stderr


def test_a_sandbox_that_begins_too_late_and_without_its_bubblewrap_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    box = made()
    late = tmp_path / "bwrap"
    late.write_text(f'#!/bin/sh\n(sleep 1; exec {box.bwrap} "$@") &\nexec sleep 1000\n')
    late.chmod(0o755)
    monkeypatch.setattr(sandbox, "SETUP_SECONDS", 0.2)
    box.bwrap = str(late)
    with pytest.raises(UserError, match=r"no sandbox can be made here: BrokenPipeError"):
        box.run("import time\ntime.sleep(1000)")
