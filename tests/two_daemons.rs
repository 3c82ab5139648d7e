//! Two machines with one volume, and a network between them and the replicas that breaks: whoever takes over writes, the
//! other one notices, says so, and loses nothing that cannot be saved.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use support::machine::{Machine, servers};
use support::mount::{Failed, How, Mount};
use support::run::{seed, wait_until};
use support::tree::{Content, Shape, Snapshot, build};

const IN_USE: i32 = 5;
/// Long enough for a shipper that backs off, on a slow machine.
const NOTICE: Duration = Duration::from_secs(90);

fn files_of(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    support::mount::bytes_of(dir)
}

/// Waits until a mount has seen that it is no longer the writer.
fn wait_fenced(m: &Mount) -> String {
    let mut why = String::new();
    wait_until(NOTICE, "the former writer turns read-only", || {
        let status = m.status();
        why = status["read_only"].as_str().unwrap_or_default().to_owned();
        !why.is_empty()
    });
    why
}

fn written(m: &Mount, name: &str, content: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(m.path(name))?;
    file.write_all(content)?;
    file.sync_all()
}

#[test]
fn a_machine_that_was_cut_off_is_overtaken() {
    let servers = servers();
    let quorum = ["fsync = \"quorum\"", "fsync_timeout = \"3s\"", "commit_interval = \"500ms\""];
    let Some(a) = Machine::new("two daemons: A", &servers, &quorum) else { return };
    let b = Machine::new("two daemons: B", &servers, &["commit_interval = \"500ms\""]).unwrap();
    let seed = seed("two daemons");
    let ma = a.v.mount();
    fs::create_dir(ma.path("tree")).unwrap();
    build(&ma.path("tree"), seed, Shape { files: 60, dirs: 5, largest: 2 << 20, sockets: false });
    let big = Content::new(seed).take(3 << 20);
    for (name, content) in [("big", &big[..]), ("kept", b"kept"), ("old name", b"moved"), ("doomed", b"x")] {
        written(&ma, name, content).unwrap();
    }
    ma.sync();
    let common = Snapshot::take(ma.root());

    // A goes on alone: what it writes is safe here, and not acknowledged as safe elsewhere.
    a.cut(true);
    fs::create_dir(ma.path("mine")).unwrap();
    let mut mine = BTreeMap::new();
    for i in 0..12_u64 {
        let content = Content::new(seed + i).take(1 << (2 * i));
        fs::write(ma.path(format!("mine/{i}")), &content).unwrap();
        mine.insert(PathBuf::from(format!("mine/{i}")), content);
    }
    let mut changed = big.clone();
    let patch = Content::new(seed + 99).take(70_000);
    changed[1_500_000..1_570_000].copy_from_slice(&patch);
    OpenOptions::new().write(true).open(ma.path("big")).unwrap().write_all_at(&patch, 1_500_000).unwrap();
    mine.insert("big".into(), changed);
    fs::rename(ma.path("old name"), ma.path("new name")).unwrap();
    fs::remove_file(ma.path("doomed")).unwrap();
    let started = Instant::now();
    let refused = written(&ma, "mine/unsent", b"on no replica").unwrap_err();
    assert!(matches!(refused.raw_os_error(), Some(libc::ETIMEDOUT | libc::EIO)), "{refused}");
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    mine.insert("mine/unsent".into(), b"on no replica".to_vec());

    // B does not take over by mistake, but on purpose.
    let asked = b.v.try_mount(&How::usual()).err().expect("the volume is in use");
    assert_eq!(asked.code, Some(IN_USE), "{}", asked.told);
    for word in [&format!("process {}", ma.pid()), "Unmount it there", "--takeover"] {
        assert!(asked.told.contains(word), "{word}: {}", asked.told);
    }
    let mb = b.v.mount_as(&How::usual().arg("--takeover"));
    assert!(mb.told().contains("took over: "), "{}", mb.told());
    common.assert_same(&Snapshot::take(mb.root()), "what B goes on from");
    written(&mb, "of b", b"of b").unwrap();
    written(&mb, "kept", b"changed by b").unwrap();
    OpenOptions::new().write(true).open(mb.path("big")).unwrap().write_all_at(b"of b", 10).unwrap();
    mb.sync();
    let theirs = Snapshot::take(mb.root());

    // A does not know, and goes on, until it meets them.
    assert!(ma.status()["read_only"].is_null(), "{}", ma.status());
    fs::write(ma.path("mine/late"), b"late").unwrap();
    mine.insert("mine/late".into(), b"late".to_vec());
    ma.ask(&["sync"], &["--timeout", "1"]).with_code(8);
    a.cut(false);
    let joined = Instant::now();
    let why = wait_fenced(&ma);
    println!("fenced {:?} after the network was back: {why}", joined.elapsed());
    for word in ["epoch 3", &format!("process {}", mb.pid()), "mirrorfs salvage"] {
        assert!(why.contains(word), "{word}: {why}");
    }
    let refused = written(&ma, "mine/too late", b"").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS), "{refused}");
    let status = ma.status();
    // Its first claim only ended the tenure of A.
    assert_eq!(status["fenced"]["epoch"], 3, "{status}");
    assert_eq!(status["fenced"]["claim"]["pid"], mb.pid(), "{status}");
    assert!(ma.ask(&["status"], &[]).ok().text().contains("no: replica "), "{status}");
    // Reading goes on, with what was written here.
    assert_eq!(fs::read(ma.path("mine/late")).unwrap(), b"late");
    ma.ask(&["sync"], &["--timeout", "20"]).with_code(IN_USE);
    let mut ours = Snapshot::take(ma.root());
    ma.unmount();

    // Its state is refused for good, also when nothing can be reached; what it held is saved.
    for off in [false, true] {
        a.cut(off);
        for how in [How::usual(), How::usual().arg("--takeover")] {
            let Failed { code, told } = a.v.try_mount(&how).err().expect("its state was overtaken");
            assert_eq!(code, Some(IN_USE), "{told}");
            assert!(told.contains("mirrorfs salvage --state ") && told.contains("epoch 3"), "{told}");
        }
    }
    a.cut(false);
    let to = a.v.path("saved");
    let report = a.salvage(&to, &["--json"]).ok();
    let report: serde_json::Value = serde_json::from_slice(&report.stdout).unwrap();
    let mut saved = files_of(&to);
    let list = String::from_utf8(saved.remove(Path::new("SALVAGE.txt")).unwrap()).unwrap();
    for (path, content) in &mine {
        assert!(saved.remove(path).as_ref() == Some(content), "{} is not saved: {list}", path.display());
    }
    // Renamed, and small enough to stand in its inode.
    assert_eq!(saved.remove(Path::new("new name")).as_deref(), Some(&b"moved"[..]));
    assert!(saved.is_empty(), "saved without need: {:?}", saved.keys());
    for line in ["old name -> new name", "  doomed"] {
        assert!(list.contains(line), "{line}: {list}");
    }
    assert_eq!(report["incomplete"], serde_json::json!([]), "{report}");
    assert_eq!(report["files"], mine.len() + 1, "{report}");
    a.salvage(&to, &[]).with_code(2).says(&["not empty"]);
    // All of it, as it was seen here at last; without a replica, out of the cache and the staging area.
    a.cut(true);
    let all = a.v.path("all");
    a.salvage(&all, &["--all"]).ok().says(&["not asked: "]);
    a.cut(false);
    fs::remove_file(all.join("SALVAGE.txt")).unwrap();
    let mut found = Snapshot::take(&all);
    for snapshot in [&mut found, &mut ours] {
        snapshot.entries.remove(Path::new(""));
    }
    ours.assert_same(&found, "all that A had");

    // What B wrote is untouched, and each replica alone has it.
    theirs.assert_same(&Snapshot::take(mb.root()), "B, when A is gone");
    mb.unmount();
    for name in ["one", "two"] {
        let to = b.v.restore(name, &format!("restored-{name}"));
        theirs.assert_same(&Snapshot::take(&to), &format!("restored from {name}"));
    }
    // A follows with an empty state, and needs no flag: B ended well.
    let ma = a.v.mount_as(&How::usual().state("next"));
    theirs.assert_same(&Snapshot::take(ma.root()), "A again");
    ma.unmount();
}

/// A writes while B comes, slowly: what A was told is on all replicas is there when B has it, whenever it was told.
#[test]
fn what_the_former_writer_acknowledged_last_is_there() {
    let servers = servers();
    let all = ["fsync = \"all\"", "fsync_timeout = \"20s\"", "commit_interval = \"300ms\""];
    let Some(a) = Machine::new("two daemons: acknowledged last, A", &servers, &all) else { return };
    let b = Machine::new("two daemons: acknowledged last, B", &servers, &["commit_interval = \"300ms\""])
        .unwrap();
    let ma = a.v.mount();
    written(&ma, "first", b"first").unwrap();
    b.proxies.iter().for_each(|p| p.faults.latency_ms.store(60, Ordering::Relaxed));
    let coming = b.v.start(&How::usual().arg("--takeover"));
    let mut told = 0;
    while written(&ma, &format!("f{told}"), format!("file {told}").as_bytes()).is_ok() {
        told += 1;
    }
    let why = wait_fenced(&ma);
    assert!(why.contains("claimed by"), "{why}");
    b.proxies.iter().for_each(|p| p.faults.latency_ms.store(0, Ordering::Relaxed));
    let mb = coming.live().unwrap_or_else(|e| panic!("{}", e.told));
    println!("{told} files were acknowledged while B came");
    for i in 0..told {
        let found = fs::read(mb.path(format!("f{i}"))).unwrap_or_else(|e| panic!("f{i} of {told}: {e}"));
        assert_eq!(found, format!("file {i}").as_bytes());
    }
    mb.unmount();
}

/// B comes and is cut off at some moment of its coming, while A writes. Whoever is the writer in the end, every file that
/// A was told is safe here is either part of the volume or saved.
#[test]
fn the_one_who_comes_is_cut_off() {
    let servers = servers();
    let settings = ["commit_interval = \"300ms\""];
    let Some(a) = Machine::new("two daemons: cut off while coming, A", &servers, &settings) else { return };
    let b = Machine::new("two daemons: cut off while coming, B", &servers, &settings).unwrap();
    let seed = seed("two daemons: cut off while coming");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let ma = a.v.mount();
    written(&ma, "first", b"first").unwrap();
    ma.sync();
    let taking = How::usual().arg("--takeover");
    // Slow enough that the cut hits all stages of its coming.
    b.proxies.iter().for_each(|p| p.faults.latency_ms.store(25, Ordering::Relaxed));
    let coming = b.v.start(&taking);
    let mut mine = Vec::new();
    let cut_at = rng.random_range(0..50);
    for i in 0..60_u64 {
        if i == cut_at {
            b.cut(true);
        }
        let content = Content::new(seed + i).take(50_000);
        if written(&ma, &format!("f{i}"), &content).is_ok() {
            mine.push((format!("f{i}"), content));
        }
        thread::sleep(Duration::from_millis(25));
    }
    // It came in time, or gives up by itself.
    let came = coming.live();
    println!("cut off before file {cut_at}; B {}", if came.is_ok() { "was live" } else { "gave up" });
    b.cut(false);
    b.proxies.iter().for_each(|p| p.faults.latency_ms.store(0, Ordering::Relaxed));
    // It decided to take over; with the same state folder it may say so again.
    let mb = came.unwrap_or_else(|_| b.v.mount_as(&taking));
    written(&mb, "of b", b"of b").unwrap();
    mb.sync();
    // A learns of it with its next transfer.
    let _ = written(&ma, "next", b"next");
    let why = wait_fenced(&ma);
    assert!(why.contains("claimed by"), "{why}");
    ma.unmount();
    let to = a.v.path("saved");
    a.salvage(&to, &[]).ok();
    let mut both = 0;
    for (name, content) in &mine {
        let (there, here) = (fs::read(mb.path(name)).ok(), fs::read(to.join(name)).ok());
        let found = [&there, &here].into_iter().flatten().any(|found| found == content);
        assert!(
            found,
            "{name} is lost, seed {seed}: {:?} {:?}",
            there.map(|c| c.len()),
            here.map(|c| c.len())
        );
        both += 1;
    }
    println!("{both} files of A, {} of them saved", files_of(&to).len() - 1);
    let theirs = Snapshot::take(mb.root());
    mb.unmount();
    for name in ["one", "two"] {
        let to = b.v.restore(name, &format!("restored-{name}"));
        theirs.assert_same(&Snapshot::take(&to), &format!("restored from {name}"));
    }
}

#[test]
fn of_two_who_come_at_once_one_writes() {
    let servers = servers();
    let settings = ["commit_interval = \"300ms\""];
    let Some(first) = Machine::new("two daemons: race, first", &servers, &settings) else { return };
    let m = first.v.mount();
    written(&m, "first", b"first").unwrap();
    m.sync();
    m.unmount();
    let machine =
        |name: &str| Machine::new(&format!("two daemons: race, {name}"), &servers, &settings).unwrap();
    let machines = [machine("a"), machine("b")];
    for round in 0..2 {
        // Released at first: nobody needs the flag. Then the winner is there, and both insist.
        let mut how = How::usual().state(&format!("state{round}"));
        if round > 0 {
            how = how.arg("--takeover");
        }
        let coming = machines.each_ref().map(|machine| machine.v.start(&how));
        let came = coming.map(Mount::live);
        let mut live = Vec::new();
        for result in came {
            match result {
                Ok(m) => live.push(m),
                Err(e) => assert_eq!(e.code, Some(IN_USE), "{}", e.told),
            }
        }
        assert!(!live.is_empty(), "nobody may write");
        assert!(round > 0 || live.len() == 1, "both write");
        // Those who came one after the other take it from each other: one is left.
        let name = format!("round{round}");
        let mut writers: Vec<Mount> = Vec::new();
        for (i, m) in live.into_iter().enumerate() {
            let _ = written(&m, &format!("{name}-{i}"), name.as_bytes());
            match m.ask(&["sync"], &["--timeout", "60"]).code {
                Some(0) => writers.push(m),
                code => {
                    assert_eq!(code, Some(IN_USE), "{}", m.told());
                    assert!(!m.status()["read_only"].is_null());
                }
            }
        }
        assert_eq!(writers.len(), 1, "exactly one writes");
        let m = writers.remove(0);
        let expected = Snapshot::take(m.root());
        if round == 0 {
            // Gone without a word.
            m.kill9();
            continue;
        }
        m.unmount();
        for name in ["one", "two"] {
            let to = machines[0].v.restore(name, &format!("restored-{name}"));
            expected.assert_same(&Snapshot::take(&to), &format!("restored from {name}"));
        }
    }
}
