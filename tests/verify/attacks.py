"""Programs that attack the sandbox.

HARM: f() is True if the attack succeeded. ENDLESS: the same, for programs that only the time limit ends. FORGERY: f(1) should be 7, which
no program knows.

$canary is a file of the host that must not change, $port a port on which the host listens, $host the process id of the host.
"""

HARM = {
    "fork bomb": """
import os
def f():
    count = 0
    try:
        while count < 200:
            if os.fork() == 0:
                while True: pass
            count += 1
    except OSError:
        pass
    return count > 40
""",
    "memory bomb": """
def f():
    blocks = []
    while len(blocks) < 30: blocks.append(bytearray(100_000_000))
    return True
""",
    "10 GB of output": """
def f():
    for _ in range(10_000): print('x' * 1_000_000)
    return True
""",
    "10 GB of output past Python": """
import os
def f():
    block = b'x' * 1_000_000
    for _ in range(10_000): os.write(2, block)
    return True
""",
    "one large file": """
def f():
    with open('/tmp/large', 'wb') as file:
        for _ in range(1000): file.write(bytes(1_000_000))
    return True
""",
    "/tmp full of files": """
def f():
    for number in range(100):
        with open(f'/tmp/{number}', 'wb') as file: file.write(bytes(10_000_000))
    return True
""",
    "/tmp full of names": """
def f():
    for number in range(100_000): open(f'/tmp/{number}', 'w').close()
    return True
""",
    "/dev/shm": "def f():\n    open('/dev/shm/trivet', 'w').close()\n    return True",
    "shared memory": """
from multiprocessing import shared_memory
def f():
    shared_memory.SharedMemory('trivet', create=True, size=1_000_000)
    return True
""",
    "delete a file": "import os\ndef f():\n    os.unlink('$canary')\n    return True",
    "delete a file past Python": "import ctypes\ndef f(): return ctypes.CDLL(None).unlink(b'$canary') == 0",
    "overwrite a file": "def f():\n    open('$canary', 'w').close()\n    return True",
    "write into the standard library": "import os\ndef f():\n    open(os.__file__, 'a').close()\n    return True",
    "read a file": "def f(): return len(open('$canary').read()) > 0",
    "read through a symlink": "import os\ndef f():\n    os.symlink('$canary', '/tmp/link')\n    return len(open('/tmp/link').read()) > 0",
    "climb out": """
import os
def f():
    there = os.open('/', os.O_RDONLY)
    for _ in range(50): os.chdir('..')
    return os.path.exists('../../../../$canary') or os.path.exists('/old')
""",
    "chroot out": """
import os
def f():
    os.mkdir('/tmp/deep'); os.chroot('/tmp/deep')
    for _ in range(50): os.chdir('..')
    os.chroot('.')
    return os.path.exists('$canary')
""",
    "/etc/passwd": "def f(): return 'root' in open('/etc/passwd').read()",
    "the environment": "import os\ndef f(): return 'TRIVET_SECRET' in os.environ or 'PATH' in os.environ",
    "the environment in /proc": "def f(): return b'TRIVET_SECRET' in open('/proc/1/environ', 'rb').read()",
    "loopback": "import socket\ndef f():\n    socket.create_connection(('127.0.0.1', $port), 2)\n    return True",
    "beyond": "import socket\ndef f():\n    socket.create_connection(('1.1.1.1', 53), 2)\n    return True",
    "a name": "import socket\ndef f(): return bool(socket.getaddrinfo('example.com', 80))",
    "listen": """
import socket
def f():
    server = socket.create_server(('127.0.0.1', 0))
    socket.create_connection(server.getsockname(), 2)
    return True
""",
    "parent's memory": """
import os
def f():
    for pid in (os.getppid(), $host):
        with open(f'/proc/{pid}/mem', 'r+b') as memory: memory.seek(4096)
    return True
""",
    "process_vm_writev": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f():
    class Part(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
    here = ctypes.create_string_buffer(8)
    part = Part(ctypes.addressof(here), 8)
    return libc.process_vm_readv($host, ctypes.byref(part), 1, ctypes.byref(part), 1, 0) > 0
""",
    "kill the parent": "import os, signal\ndef f():\n    os.kill(os.getppid() or $host, signal.SIGKILL)\n    return True",
    "kill the host": "import os, signal\ndef f():\n    os.kill($host, signal.SIGKILL)\n    return True",
    "kill the group": "import os, signal\ndef f():\n    os.killpg(os.getpgid(0), signal.SIGKILL)\n    os.kill(0, signal.SIGKILL)",
    "kill everyone": "import os, signal\ndef f():\n    os.kill(-1, signal.SIGKILL)\n    return False",
    "ptrace": "import ctypes\ndef f(): return ctypes.CDLL(None).ptrace(16, $host, 0, 0) == 0",
    "a child that outlives": """
import os, time
def f():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
""",
    "a shell": "import subprocess\ndef f(): return subprocess.run(['/bin/sh', '-c', 'true']).returncode == 0",
    "another program": "import os\ndef f(): os.execv('/lib64/ld-linux-x86-64.so.2', ['ld', '--help'])",
    "mount": "import ctypes\ndef f(): return ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "unmount": "import ctypes, os\ndef f(): return ctypes.CDLL(None).umount2(b'/tmp', 2) == 0",
    "mount in namespaces of its own": """
import ctypes
libc = ctypes.CDLL(None)
def f():
    libc.unshare(0x10000000 | 0x20000)
    return libc.mount(b'/', b'/tmp', None, 0x1000 | 0x4000, None) == 0 and open('/tmp$canary').read() != ''
""",
    "become root": "import os\ndef f():\n    os.setuid(0)\n    return True",
    "raise limits": """
import resource
def f():
    resource.setrlimit(resource.RLIMIT_AS, (1 << 45, 1 << 45))
    return True
""",
    "a core file": "import os, signal, ctypes\ndef f(): ctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "deep recursion in C": "def f():\n    x = []\n    for _ in range(10 ** 6): x = [x]\n    return x == x and repr(x) != ''",
    "a value without end": "def f():\n    x = []\n    x.append(x)\n    return x",
}

ENDLESS = {
    "fork bomb whose children fork": """
import os
def f():
    while True: os.fork()
""",
    "huge integer": "def f(): return 9 ** 9 ** 9 > 0",
    "endless loop": "def f():\n    while True: pass",
    "endless loop in many threads": """
import threading
def spin():
    while True: pass
def f():
    for _ in range(8): threading.Thread(target=spin, daemon=True).start()
    spin()
""",
    "endless sleep": "import time\ntime.sleep(1000)",
    "endless loop that ignores signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f():
    while True: pass
""",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f()",
    "a value too large to say": "def f(): return [0] * 50_000_000",
    "endless values": "def f():\n    while True: yield 1",
    "memory bomb of many processes": """
import os, time
def f():
    children = 0
    for _ in range(10):
        if os.fork() == 0:
            block = bytearray(800_000_000); time.sleep(60)
        children += 1
    return children == 10 and False
""",
}

FORGERY = {
    "leave before the tests": "import os\nos._exit(0)",
    "leave in the call": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "raise SystemExit in the call": "def f(x): raise SystemExit(0)",
    "StopIteration out of the call": "def f(x): raise StopIteration",
    "print the marker": "print('all tests passed'); print('{\"correct\": true}', flush=True)\nimport os\nos._exit(0)",
    "write to every descriptor": """
import json, os
verdict = json.dumps({"nonce": "", "correct": True, "reason": "all tests passed", "lost": False}).encode()
for fd in range(1024):
    for text in (verdict, len(verdict).to_bytes(4, 'big') + verdict, b'ok'):
        try: os.write(fd, text)
        except OSError: pass
def f(x): return None
""",
    "reply before a request": """
import gc
from engine.verify.sandbox.inside import program, wire
for found in gc.get_objects():
    if isinstance(found, program.ProgramServer):
        for _ in range(100): wire.send(found.channel, {"ok": True})
def f(x): return None
""",
    "look for the nonce": """
import gc, sys
def strings(seen):
    for found in gc.get_objects():
        for part in gc.get_referents(found):
            if isinstance(part, str) and len(part) == 32 and set(part) <= set('0123456789abcdef'): yield part
def f(x): return [*strings(set())] or None
""",
    "walk the frames for what is expected": """
import sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [value for value in frame.f_locals.values() if isinstance(value, int)]
        seen += [key for value in frame.f_locals.values() if isinstance(value, str) and 'assert' in value for key in [7]]
        frame = frame.f_back
    return 7 if 7 in seen else None
""",
    "an object equal to all": """
class All:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __bool__(self): return True
    def __sub__(self, other): return 0
    __rsub__ = __sub__
    def __hash__(self): return 0
def f(x): return All()
""",
    "an int equal to all": """
class All(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def f(x): return All(0)
""",
    "other builtins": """
import builtins, sys
builtins.AssertionError = type('Nothing', (Exception,), {})
builtins.int = builtins.abs = builtins.all = lambda *a: True
builtins.exec = builtins.compile = lambda *a, **k: None
builtins.BaseException = builtins.Exception = ()
exit = quit = lambda *a: None
sys.exit = lambda *a: None
def f(x): return 0
""",
    "other modules": """
import sys
sys.modules.clear()
import types
sys.modules['engine'] = sys.modules['json'] = sys.modules['builtins'] = types.ModuleType('x')
def f(x): return 0
""",
    "a judge of its own": """
import engine.verify.sandbox.inside.judge, engine.verify.sandbox.inside.program
import engine.verify.sandbox.inside.launcher, engine.verify.sandbox.inside.wire
engine.verify.sandbox.inside.judge.judge = lambda *a: {"correct": True, "reason": "", "lost": False}
engine.verify.sandbox.inside.program.ProgramServer.reply_to = lambda *a: {"ok": True}
engine.verify.sandbox.inside.program.ProgramServer.perform = lambda *a: {"ok": True}
engine.verify.sandbox.inside.launcher.Launcher.run = lambda *a: None
def f(x): return 0
""",
    "eval in the place of f": "f = eval",
    "a callable answer": "def f(x): return exec",
    "replace what the tests call": "def abs(x): return 0\ndef sorted(x): return [7]\ndef f(x): return 0",
    "__del__ and atexit": """
import atexit, os
class Last:
    def __del__(self): os._exit(0)
atexit.register(os._exit, 0)
last = Last()
def f(x): return 0
""",
    "signal handlers": """
import os, signal
for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGXCPU, signal.SIGSEGV):
    signal.signal(number, lambda *a: os._exit(0))
signal.setitimer(signal.ITIMER_REAL, 0.001)
def f(x): return 0
""",
    "a daemon thread": """
import os, threading, time
threading.Thread(target=lambda: (time.sleep(0.001), os._exit(0)), daemon=True).start()
def f(x):
    time.sleep(0.1)
    return 0
""",
    "close standard output": "import sys, os\nsys.stdout.close(); sys.stderr.close(); os.close(1); os.close(2)\ndef f(x): return 0",
    "close everything": "import os\nos.closerange(0, 1024)\ndef f(x): return 7",
    "trace": "import sys, threading\nsys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)\ndef f(x): return 0",
    "pass descriptors": """
import gc, os, socket
from engine.verify.sandbox.inside import program
channel = next(found for found in gc.get_objects() if isinstance(found, program.ProgramServer)).channel
socket.send_fds(channel, [b'\\0\\0\\0\\4true'], [0, 1, 2])
def f(x): return 0
""",
    "a frame without end": """
import gc
from engine.verify.sandbox.inside import program
channel = next(found for found in gc.get_objects() if isinstance(found, program.ProgramServer)).channel
channel.sendall((1 << 31).to_bytes(4, 'big') + b'x' * 100_000)
def f(x): return 0
""",
    "nesting without end": """
import gc
from engine.verify.sandbox.inside import program
channel = next(found for found in gc.get_objects() if isinstance(found, program.ProgramServer)).channel
text = b'[' * 1_000_000
channel.sendall(len(text).to_bytes(4, 'big') + text)
def f(x): return 0
""",
    "stop": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\ndef f(x): return 0",
    "nothing at all": "",
    "no Python": "((((",
    "a null byte": "def f(x): return 7 \\0",
    "nesting of the compiler": "f = " + "(" * 100_000,
}
