"""The kinds of work that the soak does, each in a folder of its own and with a memory of what must be there.

A worker goes on until it is told to stop or the mount dies under it. Then `check` compares: exactly after a quiet stop (`crashed`
false), and what a crash may not take otherwise. Workers do not know what else happens to the volume.
"""

import errno
import hashlib
import os
import random
import shutil
import sqlite3
import subprocess
import threading
import time

from volume import Failed, digest, fsx, same_trees, tree

# What calls get while the daemon is dead.
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV)
KIB, MIB = 1 << 10, 1 << 20


class Worker:
    """A folder `name` of the mount, one thread for each round."""

    name = "worker"

    def __init__(self, mnt, scratch, seed, pace, sync):
        self.root = os.path.join(mnt, self.name)
        self.local = os.path.join(scratch, f"local-{self.name}")
        self.rng = random.Random(f"{seed} {self.name}")
        self.pace, self.sync = pace, sync
        self.done = 0
        self.fault = None
        self.children = []
        os.makedirs(self.local, exist_ok=True)
        os.mkdir(self.root)
        self.prepare()

    def prepare(self):
        """Once, at the beginning."""

    def step(self):
        """One piece of work, of a second or so."""
        raise NotImplementedError

    def begin(self, stop):
        self.stop = stop
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def loop(self):
        try:
            while not self.stop.is_set():
                self.pace(self.stop)
                self.step()
                self.done += 1
        except Exception as e:  # a crash of the daemon explains it, or the run fails
            self.fault = e

    def end(self, crashed, patience=600):
        """Waits for the thread; a fault that no crash explains is a failure."""
        self.thread.join(patience)
        if self.thread.is_alive():
            raise Failed(f"{self.name}: hangs since {patience} s")
        fault, self.fault = self.fault, None
        if fault and not crashed:
            raise Failed(f"{self.name}: {type(fault).__name__}: {fault}") from fault

    def check(self, root, crashed=False):
        """`root` is the worker's folder in the mount or in a restored tree."""

    def run(self, *call, cwd=None, env=None, timeout=600):
        """A program whose failure is ours."""
        ran = subprocess.run(call, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
        if ran.returncode:
            raise Failed(f"{self.name}: {' '.join(call)}: exit code {ran.returncode}\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}")
        return ran.stdout


class Fsx(Worker):
    """fsx with a new seed each time; it compares for itself."""

    name = "fsx"
    sizes = ((20 << 10, 6 << 10, 3000), (256 << 10, 64 << 10, 2000), (3 * MIB, 200 << 10, 500))

    def step(self):
        size, most, ops = self.rng.choice(self.sizes)
        conf = os.path.join(self.local, "fsx.toml")
        with open(conf, "w") as f:
            f.write(f"flen = {size}\n[opsize]\nmin = 1\nmax = {most}\n[weights]\nclose_open = 1.0\nread = 10.0\nwrite = 10.0\n"
                    "mapread = 10.0\nmapwrite = 10.0\ninvalidate = 1.0\ntruncate = 5.0\nfsync = 0.5\nfdatasync = 0.5\n"
                    "posix_fallocate = 2.0\npunch_hole = 5.0\nsendfile = 5.0\nposix_fadvise = 3.0\ncopy_file_range = 5.0\n")
        seed = self.rng.randrange(1 << 32)
        self.run(fsx(), "-q", "-f", conf, "-N", str(ops), "-S", str(seed), "-P", self.local, os.path.join(self.root, "file"))


class Tree(Worker):
    """All kinds of changes of a tree, made on the local disk alike, and compared."""

    name = "tree"

    def prepare(self):
        self.files, self.dirs, self.serial = [], [""], 0
        self.touched = set()

    def step(self):
        for _ in range(100):
            self.one()
        if self.rng.random() < 0.2:
            # From here on a crash takes nothing of this.
            self.sync()
            self.touched = set()

    def fresh(self):
        self.serial += 1
        odd = self.rng.choice(("", "ü", "\udcff", " x" * 20, "\n", "-"))
        return os.path.join(self.rng.choice(self.dirs), f"{odd}{self.serial}")

    def both(self, do):
        """On the local disk and in the mount; both must say the same."""
        told = []
        for root in (self.local, self.root):
            try:
                told.append(do(root) or 0)
            except OSError as e:
                if root == self.root and e.errno in GONE:
                    raise
                told.append(e.errno)
        if told[0] != told[1]:
            raise Failed(f"tree: {do.__name__}: {told[0]} on the local disk, {told[1]} in the mount; {self.last}")
        return told[0] == 0

    def one(self):
        rng = self.rng
        kinds = ("write", "write", "write", "append", "cut", "punch", "rename", "link", "symlink", "unlink", "unlink", "mkdir",
                 "rmdir", "chmod", "xattr", "times", "replace", "fifo")
        kind = rng.choice(kinds)
        old = rng.choice(self.files) if self.files else None
        new = self.fresh()
        data = rng.randbytes(int(2 ** rng.uniform(0, 17)))
        at = int(2 ** rng.uniform(0, 20))
        self.last = f"{kind} {old!r} {new!r} {len(data)} {at}"
        for path in (old, new):
            self.touched.add(path)

        def write(root):
            with open(os.path.join(root, new), "wb") as f:
                f.seek(at if rng_at else 0)
                f.write(data)

        def append(root):
            with open(os.path.join(root, old), "ab") as f:
                f.write(data)

        def cut(root):
            os.truncate(os.path.join(root, old), at)

        def punch(root):
            fd = os.open(os.path.join(root, old), os.O_RDWR)
            try:
                zero = b"\0" * min(at, max(0, os.fstat(fd).st_size - 100))
                os.pwrite(fd, zero, 100)
            finally:
                os.close(fd)

        def rename(root):
            os.rename(os.path.join(root, old), os.path.join(root, new))

        def replace(root):
            os.rename(os.path.join(root, old), os.path.join(root, other))

        def link(root):
            os.link(os.path.join(root, old), os.path.join(root, new), follow_symlinks=False)

        def symlink(root):
            os.symlink(new, os.path.join(root, new))

        def unlink(root):
            os.unlink(os.path.join(root, old))

        def mkdir(root):
            os.mkdir(os.path.join(root, new))

        def rmdir(root):
            os.rmdir(os.path.join(root, directory))

        def chmod(root):
            os.chmod(os.path.join(root, old), 0o600 | at % 0o200)

        def xattr(root):
            os.setxattr(os.path.join(root, old), f"user.{at % 5}", data[:200], follow_symlinks=False)

        def times(root):
            os.utime(os.path.join(root, old), ns=(at * 1_000_003, at * 1_000_007), follow_symlinks=False)

        def fifo(root):
            os.mkfifo(os.path.join(root, new))

        rng_at = rng.random() < 0.3
        other = rng.choice(self.files) if self.files else None
        self.touched.add(other)
        directory = rng.choice(self.dirs[1:]) if len(self.dirs) > 1 else None
        do = {k: v for k, v in locals().items() if callable(v)}[kind]
        needs_file = ("append", "cut", "punch", "rename", "link", "unlink", "chmod", "xattr", "times", "replace")
        if (kind in needs_file and not old) or (kind == "rmdir" and not directory):
            return
        # Opening a fifo waits for ever; what follows links changes what they point to.
        if kind in ("append", "cut", "punch", "chmod") and not self.regular(old):
            return
        if kind == "unlink" and len(self.files) < 200:
            return
        if kind == "mkdir" and len(self.dirs) > 60:
            return
        if not self.both(do):
            return
        if kind in ("write", "link", "symlink", "fifo"):
            self.files.append(new)
        elif kind == "rename":
            self.files.remove(old)
            self.files.append(new)
        elif kind == "replace" and old != other:
            # Two names of one inode: nothing happens.
            if not os.path.lexists(os.path.join(self.local, old)):
                self.files.remove(old)
        elif kind == "unlink":
            self.files.remove(old)
        elif kind == "mkdir":
            self.dirs.append(new)
        elif kind == "rmdir":
            self.dirs.remove(directory)

    def regular(self, rel):
        path = os.path.join(self.local, rel)
        return os.path.isfile(path) and not os.path.islink(path)

    def check(self, root, crashed=False):
        # Modification times are not what this is about.
        a, b = ({path: (*what[:4], *what[5:]) for path, what in tree(at).items()} for at in (self.local, root))
        if not crashed:
            same_trees(a, b, f"{self.name}, {root}")
            return
        # What was not touched since the last sync must be as it was. The names of one file share their fate.
        touched = {b"/" + os.fsencode(p) for p in self.touched if p}
        files = {t[p][7] for t in (a, b) for p in touched if len(t.get(p, ())) == 9}

        def rest(t):
            return {p: v for p, v in t.items() if p not in touched and not (len(v) == 9 and v[7] in files)}
        same_trees(rest(a), rest(b), f"{self.name}, after a crash")
        # What the crash left is what goes on.
        shutil.rmtree(self.local)
        subprocess.run(["cp", "-a", "--no-preserve=timestamps", self.root, self.local], check=True)
        self.files, self.dirs = [], [""]
        for at, dirs, files in os.walk(self.local):
            rel = os.path.relpath(at, self.local)
            join = (lambda n, r=rel: n if r == "." else os.path.join(r, n))
            links = [d for d in dirs if os.path.islink(os.path.join(at, d))]
            self.files += [join(n) for n in files + links]
            self.dirs += [join(n) for n in dirs if n not in links]
        self.touched = set()


class Git(Worker):
    """Commits, clones and garbage collection; the last commit that git acknowledged is there for ever."""

    name = "git"

    def prepare(self):
        self.env = dict(os.environ, GIT_CONFIG_GLOBAL="/dev/null", GIT_CONFIG_NOSYSTEM="1", GIT_AUTHOR_NAME="t",
                        GIT_AUTHOR_EMAIL="t@t", GIT_COMMITTER_NAME="t", GIT_COMMITTER_EMAIL="t@t")
        self.repo = os.path.join(self.root, "repo")
        self.git(None, "init", "-q", "-b", "main", self.repo)
        self.head = None

    def git(self, repo, *words):
        words = ("-c", "core.fsync=all", "-c", "gc.auto=0", "-c", "safe.directory=*", *words)
        return self.run("git", *words, cwd=repo, env=self.env)

    def step(self):
        for _ in range(self.rng.randrange(1, 8)):
            d = os.path.join(self.repo, f"d{self.rng.randrange(8)}")
            os.makedirs(d, exist_ok=True)
            with open(os.path.join(d, f"f{self.rng.randrange(30)}"), "a") as f:
                f.write(f"{self.rng.getrandbits(256):x}\n" * self.rng.randrange(1, 200))
        self.git(self.repo, "add", "-A")
        self.git(self.repo, "commit", "-q", "-m", str(self.done))
        self.head = self.git(self.repo, "rev-parse", "HEAD").strip()
        if self.rng.random() < 0.1:
            clone = os.path.join(self.root, "clone")
            shutil.rmtree(clone, ignore_errors=True)
            self.git(None, "clone", "-q", "--no-local", self.repo, clone)
            self.git(clone, "fsck", "--full", "--strict")
        if self.rng.random() < 0.05:
            self.git(self.repo, "gc", "-q", "--prune=now")

    def check(self, root, crashed=False):
        repo = os.path.join(root, "repo")
        if crashed:
            for at, _, files in os.walk(os.path.join(repo, ".git")):
                for lock in files:
                    if lock.endswith(".lock"):
                        os.unlink(os.path.join(at, lock))
            shutil.rmtree(os.path.join(root, "clone"), ignore_errors=True)
        if not self.head:
            return
        self.git(repo, "fsck", "--full", "--strict")
        self.git(repo, "merge-base", "--is-ancestor", self.head, "HEAD")
        if crashed:
            self.git(repo, "reset", "-q", "--hard")
        elif self.git(repo, "status", "--porcelain"):
            raise Failed(f"git: the work tree in {repo} is not clean")


class Sqlite(Worker):
    """Numbered rows with checksums, in both kinds of journal; what was committed is there for ever."""

    name = "sqlite"

    def prepare(self):
        self.last = {"wal": 0, "delete": 0}
        for mode in self.last:
            db = self.open(mode)
            db.execute("create table t(id integer primary key, v blob, sum blob)")
            db.commit()
            db.close()

    def open(self, mode, root=None):
        db = sqlite3.connect(os.path.join(root or self.root, f"{mode}.db"), timeout=60)
        db.execute(f"pragma journal_mode={mode}")
        db.execute("pragma synchronous=full")
        return db

    def step(self):
        mode = self.rng.choice(("wal", "delete"))
        db = self.open(mode)
        try:
            for _ in range(5):
                n = self.last[mode]
                rows = []
                for i in range(self.rng.randrange(1, 200)):
                    v = self.rng.randbytes(self.rng.randrange(400))
                    rows.append((n + 1 + i, v, hashlib.md5(v).digest()))
                db.executemany("insert or replace into t values(?,?,?)", rows)
                db.commit()
                self.last[mode] = rows[-1][0]
            db.execute("delete from t where id < ?", (self.last[mode] - 20_000,))
            db.commit()
            if self.rng.random() < 0.05:
                db.execute("vacuum")
        finally:
            db.close()

    def check(self, root, crashed=False):
        for mode in self.last:
            db = self.open(mode, root)
            try:
                if db.execute("pragma integrity_check").fetchall() != [("ok",)]:
                    raise Failed(f"sqlite: {mode}.db in {root} is damaged")
                top = db.execute("select max(id) from t").fetchone()[0] or 0
                if top < self.last[mode] or (not crashed and top != self.last[mode]):
                    raise Failed(f"sqlite: {mode}.db in {root} ends at {top}, committed was {self.last[mode]}")
                for n, v, s in db.execute("select id, v, sum from t"):
                    if hashlib.md5(v).digest() != s:
                        raise Failed(f"sqlite: row {n} of {mode}.db in {root} is wrong")
                if crashed:
                    # A commit of which nobody was told may be there.
                    self.last[mode] = top
            finally:
                db.close()


class Big(Worker):
    """Big files, copied in several ways, with known checksums; fsynced before they count."""

    name = "big"
    most = 400 * MIB

    def prepare(self):
        self.files, self.serial = {}, 0

    def step(self):
        rng = self.rng
        self.serial += 1
        path = os.path.join(self.root, f"f{self.serial}")
        how = rng.choice(("new", "cp", "cp", "read", "append", "patch"))
        if not self.files or how == "new":
            size = int(2 ** rng.uniform(16, 24.5))
            h = hashlib.blake2b(digest_size=16)
            with open(path, "wb") as f:
                while size > 0:
                    piece = rng.randbytes(min(size, MIB))
                    f.write(piece)
                    h.update(piece)
                    size -= len(piece)
                os.fsync(f.fileno())
            self.files[path] = h.hexdigest()
        elif how == "cp":
            old = rng.choice(list(self.files))
            self.run("cp", f"--reflink={rng.choice(('auto', 'never'))}", old, path)
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            self.files[path] = self.files[old]
        else:
            old = rng.choice(list(self.files))
            fd = os.open(old, os.O_RDWR)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                if digest(old) != self.files[old]:
                    raise Failed(f"big: {old} has other content than was written")
                if how != "read":
                    # What is under way counts as unknown until it is synced.
                    del self.files[old]
                    size = os.fstat(fd).st_size
                    os.pwrite(fd, rng.randbytes(rng.randrange(1, MIB)), size if how == "append" else rng.randrange(size))
                    os.fsync(fd)
                    self.files[old] = digest(old)
            finally:
                os.close(fd)
        while sum(os.path.getsize(p) for p in self.files) > self.most:
            old = rng.choice(list(self.files))
            del self.files[old]
            os.unlink(old)

    def check(self, root, crashed=False):
        for path, sum_ in self.files.items():
            path = os.path.join(root, os.path.basename(path))
            if digest(path) != sum_:
                raise Failed(f"big: {path} has other content than was synced")
        if crashed:
            known = {os.path.basename(p) for p in self.files}
            for name in os.listdir(root):
                if name not in known:
                    os.unlink(os.path.join(root, name))


class Many(Worker):
    """Small files by the thousand, made and removed."""

    name = "many"

    def prepare(self):
        self.dirs = []

    def step(self):
        at = os.path.join(self.root, f"{self.done}")
        os.mkdir(at)
        for i in range(1000):
            with open(os.path.join(at, f"{i}"), "w") as f:
                f.write(f"{self.done} {i}\n" * (i % 50))
        fd = os.open(at, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        self.dirs.append(at)
        time.sleep(0.5)
        while len(self.dirs) > 5:
            old = self.dirs.pop(self.rng.randrange(5))
            shutil.rmtree(old)

    def check(self, root, crashed=False):
        known = {os.path.basename(d): d for d in self.dirs}
        for name in known:
            found = len(os.listdir(os.path.join(root, name)))
            if found != 1000:
                raise Failed(f"many: {found} of 1000 files in {root}/{name}")
            for i in range(0, 1000, 37):
                with open(os.path.join(root, name, str(i))) as f:
                    text = f.read()
                # Not fsynced one by one: after a crash content may be missing, but not be another's.
                expected = f"{name} {i}\n" * (i % 50)
                if text != expected and not crashed:
                    raise Failed(f"many: {root}/{name}/{i} holds {len(text)} bytes, not {len(expected)}")
        if crashed:
            for name in os.listdir(root):
                shutil.rmtree(os.path.join(root, name))
            self.dirs = []


ALL = (Fsx, Tree, Git, Sqlite, Big, Many)
