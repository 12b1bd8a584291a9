"""Programs that try to get out of the sandbox, to hold what they should not, or never to end.

Each says ESCAPED when it got what it wanted and `tried` when it has come to its end; `attempt` says it of one call. What
they aim at is put before them as names: SECRET, REPOSITORY, PARENT (a process), PORT, UNIX and so on.
"""

from dataclasses import dataclass

PRELUDE = '''
import ctypes, os, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(what, call, *arguments):
    try:
        found = call(*arguments)
    except BaseException as error:
        print("refused:", what, type(error).__name__)
    else:
        print("ESCAPED:", what, repr(found)[:200])
def asked(name, *arguments):
    """A function of the C library that gives a negative number where it is refused."""
    found = getattr(libc, name)(*arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), name)
    return found
def read(path):
    with open(path, "rb") as file:
        return file.read()
'''


@dataclass(frozen=True)
class Attack:
    """plain: harmless outside too, and there it must succeed: the attack itself is sound.
    namespaces: holds also without the filter of system calls. ends: how else than by itself it may end.
    """

    name: str
    code: str
    plain: bool = False
    namespaces: bool = True
    ends: tuple[str, ...] = ("",)


# What it must not see or change: files, devices, the environment.
FILES = [
    Attack("a file outside", "attempt('secret', read, SECRET)", plain=True),
    Attack("a folder outside", "attempt('list', os.listdir, os.path.dirname(SECRET))", plain=True),
    Attack("the home folder", "[attempt(p, os.listdir, p) for p in (HOME, '/root', '/home')]", plain=True),
    Attack("the repository", "attempt('repository', read, REPOSITORY + '/pyproject.toml')", plain=True),
    Attack("accounts", "[attempt(p, read, p) for p in ('/etc/shadow', '/etc/passwd', '/etc/hosts')]", plain=True),
    Attack("the environment", "attempt('variable', lambda: os.environ['SANDBOX_TEST_SECRET'])", plain=True),
    Attack(
        "the environment of the C library",
        "libc.getenv.restype = ctypes.c_char_p\n"
        "attempt('variable', lambda: libc.getenv(b'SANDBOX_TEST_SECRET').decode())",
        plain=True,
    ),
    Attack(
        "environments of other processes",
        "[attempt(p, read, f'/proc/{p}/environ') for p in (1, PARENT, 'self', 'thread-self')]",
        plain=True,
    ),
    Attack("the root through /proc", "attempt('root', read, '/proc/self/root' + SECRET)", plain=True),
    Attack("the parent's root through /proc", "attempt('root', read, f'/proc/{PARENT}/root' + SECRET)", plain=True),
    Attack("the parent's memory through /proc", "attempt('memory', open, f'/proc/{PARENT}/mem', 'rb')"),
    Attack("switches of the kernel", "attempt('sysctl', open, '/proc/sys/kernel/core_pattern', 'r+')"),
    Attack("the kernel through /sys", "attempt('sys', os.listdir, '/sys')", plain=True),
    Attack(
        "devices",
        "[attempt(p, os.open, '/dev/' + p, os.O_RDWR) for p in\n"
        " ('mem', 'kmem', 'kmsg', 'sda', 'vda', 'tty', 'console', 'ptmx', 'fuse', 'kvm', 'net/tun', 'shm/x')]",
    ),
    Attack("a device of its own", "import stat\nattempt('mknod', os.mknod, '/tmp/disk', stat.S_IFBLK | 0o666, 0x800)"),
    Attack(
        "a symbolic link out",
        "import tempfile\nlink = tempfile.mkdtemp() + '/link'\nos.symlink(SECRET, link)\nattempt('link', read, link)",
        plain=True,
    ),
    Attack(
        "a symbolic link out that is written to",
        "os.symlink(SECRET, '/tmp/w')\nattempt('link', lambda: open('/tmp/w', 'r+').write('x'))",
    ),
    Attack("a hard link out", "attempt('link', os.link, SECRET, os.path.dirname(SECRET) + '/hard')", plain=True),
    Attack("a hard link to a package", "attempt('link', os.link, SOMETHING_READ_ONLY, '/tmp/hard')"),
    Attack("a path that climbs", "attempt('climb', read, '/tmp' + '/..' * 40 + SECRET)", plain=True),
    Attack(
        "climbing by a folder's descriptor",
        "folder = os.open('/', os.O_RDONLY)\n"
        "for _ in range(30): folder = os.open('..', os.O_RDONLY, dir_fd=folder)\n"
        "attempt('climb', lambda: os.open(SECRET.lstrip('/'), os.O_RDONLY, dir_fd=folder))",
        plain=True,
    ),
    Attack(
        "the way out of a chroot",
        "os.mkdir('/tmp/jail')\nattempt('chroot', os.chroot, '/tmp/jail')\n"
        "for _ in range(30): os.chdir('..')\nattempt('secret', read, SECRET.lstrip('/'))",
    ),
    Attack(
        "the interpreter's own files",
        "for p in (os.__file__, sys.executable, '/program.py', SOMETHING_READ_ONLY):\n"
        "    attempt(p, open, p, 'r+b')\n    attempt(p, os.chmod, p, 0o777)\n    attempt(p, os.unlink, p)\n"
        "    attempt(p, os.rename, p, p + '.old')\n    attempt(p, os.utime, p)\n    attempt(p, os.truncate, p, 0)",
    ),
    Attack(
        "new files where they would be imported or found",
        "for p in ('', 'etc', 'usr', 'usr/lib', 'dev', 'dev/shm', 'var/tmp', 'run', 'packages', 'python', 'python/lib', 'proc'):\n"
        "    attempt(p, open, f'/{p}/sitecustomize.py', 'w')\n    attempt(p, os.mkdir, f'/{p}/new')",
    ),
    Attack(
        "descriptors it was not given",
        "for file in range(3, 1024):\n    try: print('ESCAPED:', file, os.fstat(file).st_mode)\n    except OSError: pass",
    ),
    Attack(
        "what it is given to read",
        "attempt('write', os.write, 0, b'x')\nattempt('cut', os.ftruncate, 0, 0)\nattempt('grow', os.ftruncate, 0, 1 << 30)",
    ),
]

# Other processes, other rights.
PROCESSES = [
    Attack("a signal to the parent", "attempt('kill', os.kill, PARENT, 0)", plain=True),
    Attack("killing the parent", "attempt('kill', os.kill, PARENT, signal.SIGKILL)"),
    Attack("killing the parent's group", "attempt('kill', os.killpg, PARENT_GROUP, signal.SIGKILL)"),
    Attack("killing all it may", "try: os.kill(-1, signal.SIGKILL)\nexcept OSError: pass", ends=("", "signal SIGKILL")),
    Attack("killing the first process of its namespace", "[os.kill(1, number) for number in (2, 9, 15, 19)]",
           ends=("", "exit 1")),
    Attack("killing its own group", "os.kill(0, signal.SIGKILL)", ends=("signal SIGKILL",)),
    Attack("a descriptor of the parent", "attempt('pidfd', os.pidfd_open, PARENT)", plain=True),
    Attack("tracing the parent", "attempt('ptrace', asked, 'ptrace', 16, PARENT, None, None)"),
    Attack("tracing the first process", "attempt('ptrace', asked, 'ptrace', 16, 1, None, None)", namespaces=False),
    Attack("limits of the parent", "import resource\nattempt('prlimit', resource.prlimit, PARENT, resource.RLIMIT_NOFILE)",
           plain=True),
    Attack(
        "the parent's memory",
        "class Piece(ctypes.Structure): _fields_ = [('at', ctypes.c_void_p), ('size', ctypes.c_size_t)]\n"
        "here = ctypes.create_string_buffer(8)\n"
        "attempt('memory', asked, 'process_vm_readv', PARENT, ctypes.byref(Piece(ctypes.addressof(here), 8)), 1,\n"
        "        ctypes.byref(Piece(PARENT_ADDRESS, 8)), 1, 0)",
    ),
    Attack("becoming root", "[attempt('root', call, *(0,) * n) for call, n in ((os.setuid, 1), (os.setgid, 1), (os.setresuid, 3))]"),
    Attack("other groups", "attempt('groups', os.setgroups, [0])"),
    Attack("raising its limits",
           "import resource\nfor kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):\n"
           "    limit = resource.getrlimit(kind)[1]\n    attempt(kind, resource.setrlimit, kind, (limit + 1, limit + 1))"),
    Attack("a higher priority", "attempt('nice', os.nice, -5)\n"
           "attempt('real time', os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))"),
    Attack(
        "a set-user-id program of its own",
        "import shutil\nshutil.copy(sys.executable, '/tmp/p')\nos.chmod('/tmp/p', 0o6755)\nbefore = os.getuid()\n"
        "print('tried', flush=True)\n"
        "os.execv('/tmp/p', ['p', '-S', '-c', f'import os; print(\"ESCAPED\" if os.geteuid() != {before} else \"same\")'])",
    ),
    Attack(
        "a program of its own",
        "import shutil\nshutil.copy(sys.executable, '/tmp/p')\nprint('tried', flush=True)\n"
        "os.execv('/tmp/p', ['p', '-S', '-c', f'print(\"ESCAPED\", open({SECRET!r}).read())'])",
        ends=("exit 1",),
    ),
    Attack(
        "set-user-id programs that lie about",
        "import stat\nfound = [os.path.join(d, f) for d, _, files in os.walk('/usr') for f in files\n"
        " if os.stat(os.path.join(d, f), follow_symlinks=False).st_mode & stat.S_ISUID]\n"
        "print(found, 'tried', flush=True)\nif found: os.execv(found[0], found[:1])",
        ends=("", *(f"exit {n}" for n in range(1, 128))),
    ),
    Attack("the terminal", "import fcntl, termios\n[attempt(n, fcntl.ioctl, n, termios.TIOCSTI, b'x') for n in range(3)]\n"
           "attempt('tty', open, '/dev/tty')"),
    Attack("a new user namespace", "attempt('unshare', asked, 'unshare', 0x10000000)", namespaces=False),
    Attack("new namespaces", "[attempt(hex(flag), asked, 'unshare', flag) for flag in (0x20000, 0x40000000, 0x20000000, 0x8000000)]"),
    Attack("joining the parent's namespaces",
           "attempt('setns', lambda: asked('setns', os.open(f'/proc/{PARENT}/ns/mnt', os.O_RDONLY), 0))"),
    Attack("mounting", "attempt('tmpfs', asked, 'mount', b'none', b'/tmp', b'tmpfs', 0, None)\n"
           "attempt('proc', asked, 'mount', b'none', b'/tmp', b'proc', 0, None)\n"
           "attempt('bind', asked, 'mount', b'/', b'/tmp', None, 4096, None)"),
    Attack("writing to what is read-only", "attempt('remount', asked, 'mount', None, b'/', None, 32, None)\n"
           "attempt('remount', asked, 'mount', None, b'/packages', None, 32 | 4096, None)"),
    Attack("unmounting", "[attempt(p, asked, 'umount2', p, 2) for p in (b'/', b'/tmp', b'/packages', b'/python/lib')]"),
    Attack("another root", "attempt('pivot_root', asked, 'syscall', NUMBERS['pivot_root'], b'/tmp', b'/tmp')"),
    Attack("another name of the machine", "attempt('name', socket.sethostname, 'escaped')"),
    Attack("another time", "import time\nattempt('clock', time.clock_settime, time.CLOCK_REALTIME, 0)"),
    Attack("shared memory by name", "from multiprocessing.shared_memory import SharedMemory\n"
           "attempt('posix', SharedMemory, 'escaped', True, 64)"),
]  # fmt: skip

# New processes: the filter refuses them; without it they are counted, and end with the sandbox.
FORKS = [
    Attack("a child", "attempt('fork', os.fork)", namespaces=False),
    Attack("a child by every call there is",
           "for name in ('fork', 'vfork', 'clone', 'clone3'):\n"
           "    if name in NUMBERS: attempt(name, asked, 'syscall', NUMBERS[name], 17, 0, 0, 0, 0)", namespaces=False),
    Attack("a shell", "import subprocess\nattempt('run', subprocess.run, [sys.executable, '-S', '-c', ''])\n"
           "attempt('spawn', os.posix_spawn, sys.executable, ['p', '-S', '-c', ''], {})", namespaces=False),
    Attack("a pool", "import multiprocessing\nattempt('pool', multiprocessing.Process(target=print).start)", namespaces=False),
    Attack("a fork bomb", "while True:\n    try: os.fork()\n    except OSError: break", ends=("", "time", "exit 1", "signal SIGKILL")),
    Attack("a bomb of threads",
           "import threading, time\ncount = 0\ntry:\n"
           "    while count < 300:\n        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n        count += 1\n"
           "except RuntimeError: pass\nif count > 64: print('ESCAPED:', count)"),
    Attack("threads with small stacks",
           "import threading, time\nthreading.stack_size(32768)\ncount = 0\ntry:\n"
           "    while count < 300:\n        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n        count += 1\n"
           "except RuntimeError: pass\nif count > 64: print('ESCAPED:', count)"),
]  # fmt: skip

# A server of the test listens on each of these.
NETWORK = [
    Attack("TCP", "attempt('tcp', socket.create_connection, ('127.0.0.1', PORT), 2)", plain=True),
    Attack("UDP", "udp = socket.socket(type=socket.SOCK_DGRAM)\nudp.settimeout(2)\nudp.connect(('127.0.0.1', PORT))\n"
           "udp.send(b'x')\nattempt('answer', udp.recv, 9)", plain=True, ends=("", "exit 1")),
    Attack("a Unix socket", "attempt('unix', lambda: socket.socket(socket.AF_UNIX).connect(UNIX))", plain=True),
    Attack("an abstract Unix socket", "attempt('unix', lambda: socket.socket(socket.AF_UNIX).connect(ABSTRACT))", plain=True),
    Attack("HTTP", "import urllib.request\nattempt('http', urllib.request.urlopen, f'http://127.0.0.1:{PORT}/', None, 2)", plain=True),
    Attack("the cloud's metadata", "attempt('http', socket.create_connection, ('169.254.169.254', 80), 1)"),
    Attack("names of hosts", "attempt('dns', socket.getaddrinfo, 'example.org', 80)"),
    Attack("the kernel by netlink", "attempt('netlink', lambda: socket.socket(16, socket.SOCK_RAW, 0).bind((0, 0)))",
           plain=True, namespaces=False),
    Attack("raw packets", "attempt('raw', socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)\n"
           "attempt('packet', socket.socket, 17, socket.SOCK_RAW, 3)"),
    Attack("the host of a virtual machine", "attempt('vsock', lambda: socket.socket(40, socket.SOCK_STREAM))", namespaces=False),
    Attack("cryptography in the kernel", "attempt('alg', lambda: socket.socket(38, socket.SOCK_SEQPACKET))", namespaces=False),
    Attack("a server of its own", "attempt('listen', lambda: socket.create_server(('127.0.0.1', 0)))", namespaces=False),
]  # fmt: skip

# Memory, disk, output: it may try, and is stopped at its limits. DISK and MEMORY are bytes.
GREED = [
    Attack("one large block of memory", "attempt('memory', bytearray, 8 * MEMORY)"),
    Attack("memory bit by bit",
           "held = []\ntry:\n    while len(held) < 64: held.append(bytearray(MEMORY // 16))\nexcept MemoryError: pass\n"
           "if len(held) > 16: print('ESCAPED:', len(held))"),
    Attack("memory by mmap", "import mmap\nattempt('private', mmap.mmap, -1, 4 * MEMORY)\n"
           "attempt('shared', mmap.mmap, -1, 4 * MEMORY, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)"),
    Attack("a list of endless length", "attempt('list', lambda: [0] * 10**12)"),
    Attack("a text of endless length", "attempt('text', lambda: '9' * 10**12)"),
    Attack("one large file",
           "size = 0\ntry:\n    with open('/tmp/x', 'wb') as file:\n"
           "        while size < 4 * DISK: size += file.write(bytes(1 << 20))\nexcept OSError: pass\n"
           "if size > DISK: print('ESCAPED:', size)"),
    Attack("many files",
           "size = 0\ntry:\n    for number in range(200):\n        with open(f'/tmp/{number}', 'wb') as file:\n"
           "            size += file.write(bytes(DISK // 40))\nexcept OSError: pass\nif size > DISK: print('ESCAPED:', size)"),
    Attack("a file with holes", "with open('/tmp/x', 'wb') as file: attempt('hole', file.truncate, 1 << 50)"),
    Attack("room set aside", "with open('/tmp/x', 'wb') as file: attempt('room', os.posix_fallocate, file.fileno(), 0, 1 << 40)"),
    Attack("disks that are memory", "[attempt(p, open, p + '/x', 'wb') for p in ('/dev/shm', '/run', '/var/tmp', '/dev', '/')]"),
    Attack("all descriptors", "held = []\ntry:\n    while len(held) < 9000: held.append(os.open('/dev/null', 0))\nexcept OSError: pass\n"
           "if len(held) > 64: print('ESCAPED:', len(held))"),
    Attack("a segment of System V memory", "attempt('shmget', asked, 'shmget', 0, 1 << 20, 0o1600)", namespaces=False),
    Attack("output in one piece", "print('x' * 50_000_000)"),
    Attack("output on standard error", "print('x' * 20_000_000, file=sys.stderr)"),
    Attack("output that is no text", "sys.stdout.buffer.write(bytes(range(256)) * 1000)"),
    Attack("output that drives a terminal", "print('\\x1b[2J\\x1b]0;title\\x07')"),
]  # fmt: skip

# Nothing of these ends by itself, or they end as they should not.
STUBBORN = [
    Attack("an endless loop", "while True: pass", ends=("time", "signal SIGKILL")),
    Attack("sleep", "import time\ntime.sleep(1000)", ends=("time",)),
    Attack("signals ignored",
           "for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)\n"
           "import time\nwhile True: time.sleep(0.01)", ends=("time",)),
    Attack("signals blocked", "signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())\nwhile True: pass",
           ends=("time", "signal SIGKILL")),
    Attack("itself stopped", "os.kill(os.getpid(), signal.SIGSTOP)", ends=("time",)),
    Attack("a bomb at exit", "import atexit, time\natexit.register(time.sleep, 1000)\nprint('tried', flush=True)", ends=("time",)),
    Attack("a bomb in a finalizer",
           "import time\nclass Bomb:\n    def __del__(self, sleep=time.sleep): sleep(1000)\nkept = Bomb()\nkept.itself = kept",
           ends=("time",)),
    Attack("a thread that stays", "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()", ends=("time",)),
    Attack("a number without end", "10 ** 10 ** 9", ends=("time", "signal SIGKILL", "exit 1")),
    Attack("a pattern without end", "import re\nre.match(r'(a+)+$', 'a' * 64 + 'b')", ends=("time", "signal SIGKILL")),
    Attack("exits refused", "import time\nwhile True:\n    try: time.sleep(1000)\n    except BaseException: pass", ends=("time",)),
    Attack("its outputs closed", "import time\n[os.close(n) for n in range(3)]\ntime.sleep(1000)", ends=("time",)),
    Attack("output without end", "while True: print('x' * 10000)", ends=("time", "signal SIGKILL")),
    Attack("standard error without end", "while True: os.write(2, b'x' * 65536)", ends=("time", "signal SIGKILL")),
    Attack("empty files without end", "number = 0\nwhile True:\n    open(f'/tmp/{number}', 'w').close()\n    number += 1",
           ends=("time", "signal SIGKILL", "exit 1")),
    Attack("folders in folders without end", "while True:\n    os.mkdir('x')\n    os.chdir('x')", ends=("time", "signal SIGKILL", "exit 1")),
    Attack("deep recursion", "sys.setrecursionlimit(10**9)\nf = lambda: f()\ng = lambda x: [g(x) for _ in '1']\ng(0)",
           ends=("signal SIGSEGV", "exit 1", "time", "signal SIGKILL")),
    Attack("brackets in brackets", "compile('(' * 10**6, '', 'eval')", ends=("exit 1", "signal SIGSEGV")),
    Attack("a null pointer", "ctypes.string_at(0)", ends=("signal SIGSEGV",)),
    Attack("abort", "os.abort()", ends=("signal SIGABRT",)),
]  # fmt: skip

# System calls that no program needs: each must not exist. By name; the numbers are libseccomp's.
CALLS = """
fork vfork clone3 ptrace process_vm_readv process_vm_writev kcmp mount umount2 pivot_root chroot unshare setns fsopen
fsconfig fsmount fspick open_tree move_mount mount_setattr socket socketpair connect bind listen accept accept4 sendto
sendmsg sendmmsg recvfrom recvmsg recvmmsg bpf perf_event_open io_uring_setup io_uring_enter io_uring_register keyctl
add_key request_key kexec_load kexec_file_load init_module finit_module delete_module userfaultfd open_by_handle_at
name_to_handle_at fanotify_init fanotify_mark inotify_init1 quotactl acct syslog swapon swapoff reboot settimeofday
clock_settime clock_adjtime adjtimex sethostname setdomainname iopl ioperm modify_ldt shmget shmat shmctl msgget
msgsnd semget semop mq_open mq_unlink memfd_create memfd_secret pidfd_open pidfd_getfd pidfd_send_signal prctl seccomp
capset personality setuid setgid setpriority sched_setscheduler sched_setattr ioprio_set vmsplice splice tee mbind
migrate_pages move_pages set_mempolicy mknod mknodat chown fchown lchown fchownat vhangup lookup_dcookie uselib
landlock_create_ruleset process_madvise process_mrelease
""".split()  # noqa: SIM905
