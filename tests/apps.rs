//! Programs as people use them, through the mount.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::mount::{How, Volume};
use support::run::{Ran, has_tool, is_root, run, seed};
use support::tree::{Content, Shape, Snapshot, build};

const LONG: Duration = Duration::from_secs(300);

#[track_caller]
fn sh(dir: &Path, script: &str) -> Ran {
    run(Command::new("sh").arg("-euc").arg(script).current_dir(dir), LONG).ok()
}

/// A volume with one replica.
fn volume(test: &str, tools: &[&str]) -> Option<Volume> {
    let mut v = Volume::new(test)?;
    // All are asked for, so that all that are missing are named.
    if tools.iter().filter(|t| !has_tool(test, t)).count() > 0 {
        return None;
    }
    v.folder("a");
    Some(v)
}

const GIT: &str = "export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t \
    GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@t;";

#[test]
fn git_clones_works_and_checks() {
    let Some(v) = volume("apps: git", &["git"]) else { return };
    let source = v.path("source");
    fs::create_dir(&source).unwrap();
    sh(
        &source,
        &format!(
            "{GIT} git init -q . ; for c in 1 2 3 4 5 6 7 8; do mkdir -p d$c; \
             for i in $(seq 1 40); do head -c $((i * c * 37)) /dev/urandom | od > d$c/f$i; done; \
             git add -A; git commit -qm c$c; done; git tag v1"
        ),
    );
    let m = v.mount();
    let at = m.root();
    sh(at, &format!("{GIT} git clone -q --no-local {} clone", source.display()));
    sh(at, &format!("{GIT} git -C clone fsck --full --strict"));
    let script = "cd clone; git checkout -q -b work; for i in 1 2 3 4 5; do echo $i >> d1/f1; git mv d2/f$i d3/m$i; \
                  git commit -qam w$i; done; git gc -q --aggressive --prune=now; git fsck --full --strict; \
                  test -z \"$(git status --porcelain)\"; git checkout -q master 2>/dev/null || git checkout -q main";
    sh(at, &format!("{GIT} {script}"));
    sh(at, &format!("diff -r --exclude=.git {} clone", source.display()));
    m.unmount();
    let m = v.mount();
    sh(
        m.root(),
        &format!("{GIT} git -C clone fsck --full --strict; test $(git -C clone rev-list --count work) = 13"),
    );
    m.unmount();
}

#[test]
fn sqlite_keeps_its_integrity() {
    let Some(v) = volume("apps: sqlite", &["sqlite3"]) else { return };
    let m = v.mount();
    for mode in ["wal", "delete"] {
        let script = format!(
            "sqlite3 {mode}.db 'pragma journal_mode={mode}; create table t(id integer primary key, k text, v blob); \
             create index tk on t(k);' > /dev/null
             for n in 1 2 3 4 5 6; do sqlite3 {mode}.db \"begin; with recursive c(x) as (select 1 union all select x+1 from c \
             where x<4000) insert into t(k,v) select hex(randomblob(8)), randomblob(300) from c; commit; \
             delete from t where id%7=$n; update t set v=randomblob(500) where id%11=$n;\"; done
             sqlite3 {mode}.db 'pragma integrity_check; pragma wal_checkpoint(truncate); vacuum; pragma integrity_check;' \
             > out.{mode}; test \"$(grep -c '^ok$' out.{mode})\" = 2
             sqlite3 {mode}.db 'select count(*), total(length(v)), group_concat(distinct id%7) from t' > sum.{mode}"
        );
        sh(m.root(), &script);
    }
    // Two at once: locks must work.
    sh(
        m.root(),
        "sqlite3 two.db 'pragma journal_mode=wal; create table t(x)' > /dev/null
         for p in 1 2; do (for i in $(seq 1 60); do sqlite3 -cmd '.timeout 20000' two.db \"insert into t values($p)\"; done) & done; wait
         test \"$(sqlite3 two.db 'select count(*) from t')\" = 120",
    );
    let sums = sh(m.root(), "cat sum.wal sum.delete").text();
    m.kill9();
    let m = v.mount();
    for mode in ["wal", "delete", "two"] {
        let ran = sh(m.root(), &format!("sqlite3 {mode}.db 'pragma integrity_check'"));
        assert_eq!(ran.text(), "ok", "{mode}");
    }
    let query = "select count(*), total(length(v)), group_concat(distinct id%7) from t";
    let again = sh(m.root(), &format!("sqlite3 wal.db '{query}'; sqlite3 delete.db '{query}'")).text();
    assert_eq!(again, sums);
    m.unmount();
}

#[test]
fn tar_unpacks_everything() {
    let Some(v) = volume("apps: tar", &["tar"]) else { return };
    let plain = v.path("plain");
    fs::create_dir(&plain).unwrap();
    // tar leaves out sockets.
    build(&plain, seed("apps: tar"), Shape { sockets: false, files: 800, dirs: 30, largest: 4 << 20 });
    // What it does not keep of its own accord: attributes other than user's, and times outside its form's range.
    let m = v.mount();
    let into = m.path("into");
    fs::create_dir(&into).unwrap();
    let flags = "--format=posix --sparse --xattrs --xattrs-include='*' --numeric-owner";
    let script = format!(
        "tar -C {} {flags} -cf archive.tar . && tar -C {} {flags} -xpf archive.tar",
        plain.display(),
        into.display()
    );
    sh(&v.path(""), &script);
    Snapshot::take(&plain).assert_same(&Snapshot::take(&into), "unpacked");
    // And packed again, out of the mount.
    let back = v.path("back");
    fs::create_dir(&back).unwrap();
    sh(
        &v.path(""),
        &format!("tar -C {} {flags} -c . | tar -C {} {flags} -xp", into.display(), back.display()),
    );
    Snapshot::take(&into).assert_same(&Snapshot::take(&back), "packed out of the mount");
    sh(m.root(), "cp -a into copy && rm -rf into && mv copy into");
    Snapshot::take(&back).assert_same(&Snapshot::take(&into), "copied within the mount");
    m.unmount();
}

#[test]
fn cargo_builds_in_it() {
    let Some(v) = volume("apps: cargo", &["cargo"]) else { return };
    let m = v.mount();
    let at = m.path("hello");
    fs::create_dir_all(at.join("src")).unwrap();
    let manifest = "[package]\nname = \"hello\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[workspace]\n";
    fs::write(at.join("Cargo.toml"), manifest).unwrap();
    fs::write(at.join("src/lib.rs"), "pub fn six() -> u32 { 6 }\n#[test]\nfn t() { assert_eq!(six(), 6) }\n")
        .unwrap();
    fs::write(at.join("src/main.rs"), "fn main() { println!(\"{}\", hello::six() * 7) }\n").unwrap();
    let cargo = |args: &[&str]| {
        let mut command = Command::new("cargo");
        for (name, _) in std::env::vars_os() {
            // What our own cargo told us is not meant for this one.
            let name = name.to_string_lossy().into_owned();
            if name.starts_with("CARGO") && name != "CARGO_HOME" {
                command.env_remove(name);
            }
        }
        run(command.args(args).arg("--offline").current_dir(&at), LONG).ok()
    };
    assert_eq!(cargo(&["run", "-q"]).text(), "42");
    cargo(&["test", "-q"]);
    fs::write(at.join("src/lib.rs"), "pub fn six() -> u32 { 5 + 1 + 1 }\n").unwrap();
    assert_eq!(cargo(&["run", "-q"]).text(), "49", "the change went unnoticed");
    assert!(cargo(&["build"]).stderr.contains("Finished"));
    m.unmount();
    let m = v.mount();
    // Run from the mount, paged in through it.
    assert_eq!(run(&mut Command::new(m.path("hello/target/debug/hello")), LONG).ok().text(), "49");
    m.unmount();
}

#[test]
fn an_editor_rewrites_a_file_while_others_read_it() {
    let Some(v) = volume("apps: editor", &[]) else { return };
    let m = v.mount();
    let doc = m.path("doc");
    let version = |i: usize| format!("{i:06}\n").repeat(5000 + i);
    fs::write(&doc, version(0)).unwrap();
    thread::scope(|s| {
        let writer = s.spawn(|| {
            for i in 1..=150 {
                let mut f = fs::File::create(m.path("doc~")).unwrap();
                f.write_all(version(i).as_bytes()).unwrap();
                f.sync_all().unwrap();
                fs::rename(m.path("doc~"), &doc).unwrap();
            }
        });
        let mut last = 0;
        while !writer.is_finished() {
            let text = fs::read_to_string(&doc).unwrap();
            let i: usize = text[..6].parse().unwrap();
            assert!(text == version(i), "half of version {i}");
            assert!(i >= last, "version {i} after {last}");
            last = i;
        }
    });
    assert!(fs::read_to_string(&doc).unwrap() == version(150));
    m.unmount();
}

#[test]
fn dd_of_two_gigabytes_through_a_small_cache() {
    let Some(mut v) = volume("apps: dd", &["dd"]) else { return };
    v.setting("cache_size = \"512MiB\"");
    let m = v.mount();
    let size = 2 << 30;
    let started = Instant::now();
    let mut dd = Command::new("dd")
        .args(["bs=1M", "iflag=fullblock", "conv=fsync", "status=none"])
        .arg(format!("of={}", m.path("big").display()))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut expected = blake3::Hasher::new();
    let mut pipe = dd.stdin.take().unwrap();
    // Noise made quickly: one random block, changed a little from one to the next.
    let mut block = Content::new(4).take(1 << 20);
    for i in 0..size >> 20 {
        for (n, word) in block.chunks_exact_mut(8).enumerate() {
            let old = u64::from_le_bytes(word.try_into().unwrap());
            let new = old.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(n as u64 ^ i);
            word.copy_from_slice(&new.to_le_bytes());
        }
        expected.update(&block);
        pipe.write_all(&block).unwrap();
    }
    drop(pipe);
    assert!(dd.wait().unwrap().success());
    println!("2 GiB written and synced in {:?}", started.elapsed());
    let expected = expected.finalize();
    let hash = |path: &Path| {
        let mut hasher = blake3::Hasher::new();
        std::io::copy(&mut fs::File::open(path).unwrap(), &mut hasher).unwrap();
        hasher.finalize()
    };
    let started = Instant::now();
    if is_root() {
        // So that it is really asked for; needs root.
        let _ = fs::write("/proc/sys/vm/drop_caches", "1");
    }
    assert_eq!(hash(&m.path("big")), expected, "read back");
    println!("and read in {:?}", started.elapsed());
    m.sync();
    m.unmount();
    fs::remove_dir_all(v.path("state")).unwrap();
    let m = v.mount_as(&How::usual().state("fresh").arg("--read-only"));
    assert_eq!(hash(&m.path("big")), expected, "from the replica");
    m.unmount();
}
