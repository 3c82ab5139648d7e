"""What the long tests in this folder share: a volume with its daemon, tools that are installed when missing, comparisons.

It owns processes, mounts and the scratch folder, and leaves none of them behind unless the run failed: then the folder stays as
evidence and is named. It does not know what is tested.
"""

import atexit
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
FSX_VERSION = "0.3.2"
LIBC = ctypes.CDLL(None, use_errno=True)
# The daemon itself is our child, so that it can be killed and measured. A variable, because older builds do not know the flag.
os.environ["MIRRORFS_UNGUARDED"] = "1"
MNT_DETACH = 2


class Failed(Exception):
    """The run found a fault, or could not be made."""


def say(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def seed_from(given):
    """The seed of a run, printed so that it can be repeated."""
    seed = int(given) if given is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    return seed


def program():
    """The mirrorfs that is tested: $MIRRORFS, or a release build made here and now."""
    given = os.environ.get("MIRRORFS")
    if not given:
        given = os.path.join(TARGET, "release", "mirrorfs")
        if subprocess.call(["cargo", "build", "--release", "--locked", "--quiet"], cwd=ROOT):
            raise Failed("mirrorfs cannot be built")
    return os.path.abspath(given)


def tool(name, package=None):
    """The path of a program; installed from Debian's `package` when missing and we are root. None when it cannot be had."""
    found = shutil.which(name)
    if not found and package and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.call(["apt-get", "update", "-qq"], **quiet)
        env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        subprocess.call(["apt-get", "install", "-y", "-qq", "--no-install-recommends", package], env=env, **quiet)
        found = shutil.which(name)
    return found


def fsx():
    """The path of fsx; installed with cargo when missing."""
    given = os.environ.get("FSX") or os.path.join(TARGET, "fsx", "bin", "fsx")
    if not os.access(given, os.X_OK):
        say(f"installing fsx into {TARGET}/fsx (a minute or two)")
        root = os.path.join(TARGET, "fsx")
        call = ["cargo", "install", "--quiet", "--locked", "--root", root, f"fsx@{FSX_VERSION}"]
        if subprocess.call(call, cwd=ROOT):
            raise Failed("fsx cannot be installed (cargo install fsx)")
    return given


def die_with_parent():
    LIBC.prctl(1, signal.SIGKILL)


def mounts_below(prefix):
    """Where something is mounted, below a folder of ours (without odd characters in its path)."""
    with open("/proc/self/mountinfo") as f:
        return [at for at in (line.split()[4] for line in f) if at.startswith(prefix)]


class Scratch:
    """A folder for one run. Removed at the end, unless `keep` was set."""

    def __init__(self, name, where=None):
        where = where or os.environ.get("TMPDIR") or "/tmp"
        os.makedirs(where, exist_ok=True)
        self.path = tempfile.mkdtemp(prefix=f"mirrorfs-{name}.", dir=where)
        os.chmod(self.path, 0o755)
        self.keep = False
        self.volumes = []
        atexit.register(self.close)
        # So that atexit runs.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def join(self, *names):
        return os.path.join(self.path, *names)

    def close(self):
        for volume in self.volumes:
            volume.stop()
        for at in reversed(mounts_below(self.path + "/")):
            LIBC.umount2(os.fsencode(at), MNT_DETACH)
        if self.keep:
            print(f"the evidence is in {self.path}", flush=True)
        elif os.path.isdir(self.path):
            # Also what lies deeper than a path may be long.
            subprocess.call(["rm", "-rf", "--one-file-system", self.path])


class Volume:
    """A volume in a scratch folder: replicas are folders beside it, the daemon is our child."""

    def __init__(self, scratch, name="volume", replicas=("a", "b"), settings=None, options=()):
        self.dir = scratch.join(name)
        os.mkdir(self.dir)
        self.mnt = os.path.join(self.dir, "mnt")
        self.state = os.path.join(self.dir, "state")
        self.log = os.path.join(self.dir, "daemon.log")
        os.mkdir(self.mnt)
        self.settings = dict(settings or {})
        self.options = list(options)
        self.replicas = {}
        self.daemon = None
        self.ended = []
        self.binary = program()
        for r in replicas:
            self.add_replica(r)
        scratch.volumes.append(self)

    def add_replica(self, name, url=None, **options):
        """A folder, or `url`."""
        if url is None:
            url = os.path.join(self.dir, f"replica-{name}")
            os.makedirs(url, exist_ok=True)
        self.replicas[name] = (url, options)

    def folder(self, name):
        return self.replicas[name][0]

    def env(self):
        env = {k: v for k, v in os.environ.items() if not k.startswith("MIRRORFS_")}
        env["XDG_STATE_HOME"] = os.path.join(self.dir, "xdg")
        env["MIRRORFS_FREE_SPACE_RATIO"] = "0"
        env["MIRRORFS_LOG"] = os.environ.get("MIRRORFS_TEST_LOG", "info")
        return env

    def config(self):
        path = os.path.join(self.dir, "volume.toml")
        with open(path, "w") as f:
            for key, value in self.settings.items():
                f.write(f"{key} = {json.dumps(value)}\n")
            for name, (url, options) in self.replicas.items():
                f.write(f"[replica.{name}]\nurl = {json.dumps(url)}\n")
                for key, value in options.items():
                    f.write(f"{key} = {json.dumps(value)}\n")
        return path

    def mount(self, *more, patience=180, preexec=None):
        """Mounts, and waits until the daemon answers."""
        call = [self.binary, "mount", self.mnt, "--foreground", "--config", self.config(), "--state", self.state]

        def prepare():
            die_with_parent()
            if preexec:
                preexec()

        with open(self.log, "a") as log:
            self.daemon = subprocess.Popen(
                call + self.options + list(more), env=self.env(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=prepare)
        until = time.monotonic() + patience
        while self.ask("status", "--json", check=False).returncode != 0:
            if self.daemon.poll() is not None:
                raise Failed(f"cannot mount (exit code {self.daemon.returncode}):\n{self.told(15)}")
            if time.monotonic() > until:
                raise Failed(f"not live after {patience} s:\n{self.told(15)}")
            time.sleep(0.05)
        return self

    @property
    def pid(self):
        return self.daemon.pid

    def told(self, lines=40):
        with open(self.log, errors="replace") as f:
            return "".join(f.readlines()[-lines:])

    def path(self, *names):
        return os.path.join(self.mnt, *names)

    def run(self, *words, timeout=900, check=True):
        """Runs a mirrorfs command."""
        try:
            ran = subprocess.run([self.binary, *words], env=self.env(), capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"mirrorfs {' '.join(words)} does not end within {timeout} s:\n{self.told()}") from None
        if check and ran.returncode:
            raise Failed(f"mirrorfs {' '.join(words)}: exit code {ran.returncode}\n{ran.stdout}{ran.stderr}\n{self.told()}")
        return ran

    def ask(self, command, *more, **how):
        return self.run(command, self.mnt, *more, **how)

    def status(self):
        return json.loads(self.ask("status", "--json").stdout)

    def sync(self, timeout=600):
        self.ask("sync", "--timeout", f"{timeout}s", timeout=timeout + 30)

    def unmount(self, patience=300):
        """In good order; the daemon must end with 0."""
        self.ask("umount", timeout=patience)
        try:
            code = self.daemon.wait(patience)
        except subprocess.TimeoutExpired:
            raise Failed(f"the daemon does not end:\n{self.told()}") from None
        self.daemon = None
        if code:
            raise Failed(f"the daemon ended with {code}:\n{self.told()}")

    def kill9(self):
        """As a crash would."""
        if self.daemon:
            self.daemon.kill()
            self.daemon.wait()
            self.daemon = None
        self.detach()

    def detach(self):
        for _ in range(20):
            if self.mnt not in mounts_below(self.mnt):
                return
            # Fails for others than root.
            if LIBC.umount2(self.mnt.encode(), MNT_DETACH) and shutil.which("fusermount3"):
                subprocess.call(["fusermount3", "-uz", "--", self.mnt], stderr=subprocess.DEVNULL)

    stop = kill9

    def restore(self, replica, to, timeout=1800):
        self.run("restore", "--from", replica, "--to", to, "--config", self.config(), timeout=timeout)
        return to

    def scrub(self, timeout=900):
        return self.ask("scrub", "--deep", "--wait", timeout=timeout).stdout

    def replicas_equal(self):
        """Every folder replica holds the same segments."""
        def segments(folder):
            found = {}
            for at, _, files in os.walk(os.path.join(folder, "segments")):
                for name in files:
                    if name.endswith(".seg"):
                        found[name] = digest(os.path.join(at, name))
            return found
        pictures = {name: segments(url) for name, (url, _) in self.replicas.items() if url.startswith("/")}
        first, *others = pictures
        for other in others:
            if pictures[first] != pictures[other]:
                a, b = pictures[first], pictures[other]
                differ = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
                raise Failed(f"replicas {first} and {other} differ: {differ[:10]}")
        return len(pictures[first])


def forget(what):
    """Makes the kernel forget what it has read (1), names and inodes (2), or both (3). Only root may."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as f:
        f.write(what)


def digest(path):
    """BLAKE2 of a file's content."""
    h = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            h.update(piece)
    return h.hexdigest()


def tree(root):
    """Everything below `root`: path as bytes -> (kind, mode, uid, gid, modification time, attributes, ...); for a file also its
    size, its number of names, the first of them, and the digest of its content."""
    root = os.fsencode(root)
    found, sums, names = {}, {}, {}
    for at, dirs, files in os.walk(root):
        for name in dirs + files:
            path = os.path.join(at, name)
            st = os.lstat(path)
            xattrs = {n: os.getxattr(path, n, follow_symlinks=False) for n in os.listxattr(path, follow_symlinks=False)}
            what = (stat.S_IFMT(st.st_mode), stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns, xattrs)
            if stat.S_ISREG(st.st_mode):
                names.setdefault(st.st_ino, []).append(path[len(root):])
                if st.st_ino not in sums:
                    sums[st.st_ino] = digest(path)
                what += (st.st_size, st.st_nlink, st.st_ino, sums[st.st_ino])
            elif stat.S_ISLNK(st.st_mode):
                what += (os.readlink(path),)
            elif not stat.S_ISDIR(st.st_mode):
                what += (st.st_rdev,)
            found[path[len(root):]] = what
    return {p: w if len(w) < 10 else (*w[:8], min(names[w[8]]), w[9]) for p, w in found.items()}


def same_trees(expected, got, what):
    """Raises, naming the first differences."""
    if expected != got:
        paths = sorted(p for p in expected.keys() | got.keys() if expected.get(p) != got.get(p))
        shown = "\n".join(f"  {p!r}: {expected.get(p)} -> {got.get(p)}" for p in paths[:10])
        raise Failed(f"{what}: {len(paths)} differences\n{shown}")


def main(run, name):
    """Runs it; a failure is told, ends with 1, and keeps the scratch folder."""
    scratch = Scratch(name)
    started = time.monotonic()
    try:
        run(scratch)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)
    except Exception as e:
        scratch.keep = True
        if not isinstance(e, Failed):
            import traceback
            traceback.print_exc()
        print(f"FAILED after {time.monotonic() - started:.0f} s: {e}", flush=True)
        sys.exit(1)
    print(f"passed in {time.monotonic() - started:.0f} s", flush=True)
