//! What is wrong is refused with words that name the thing and the remedy, and nothing is changed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use support::mount::{Failed, How, LIMIT, Volume, bytes_of, flip_bit, segments};
use support::run::{is_root, mirrorfs, run, wait_until};
use support::s3::{BUCKET, S3Server};
use support::tree::Content;

// The exit codes of the documentation.
const USAGE: i32 = 2;
const NO_VOLUME: i32 = 3;
const WRONG_VOLUME: i32 = 4;
const IN_USE: i32 = 5;
const UNREACHABLE: i32 = 6;
const DAMAGED: i32 = 7;
const TOO_NEW: i32 = 10;

/// Mounting fails with this code, and says each of these.
#[track_caller]
fn refused(v: &Volume, how: &How, code: i32, words: &[&str]) -> Failed {
    let failed = match v.try_mount(how) {
        Ok(_) => panic!("it was mounted"),
        Err(failed) => failed,
    };
    assert_eq!(failed.code, Some(code), "{}", failed.told);
    for word in words {
        assert!(failed.told.contains(word), "does not say {word:?}: {}", failed.told);
    }
    assert!(!failed.told.contains("panicked"), "{}", failed.told);
    failed
}

/// A volume with something in it on each of these folders, unmounted.
fn filled(test: &str, folders: &[&str]) -> Option<Volume> {
    let mut v = Volume::new(test)?;
    for name in folders {
        v.folder(name);
    }
    let m = v.mount();
    for i in 0..5 {
        fs::write(m.path(format!("f{i}")), Content::new(i * 4).take(100_000)).unwrap();
    }
    m.sync();
    m.unmount();
    Some(v)
}

fn fresh() -> How {
    How::usual().state("fresh")
}

#[test]
fn another_volumes_replica() {
    let Some(mut v) = filled("badinput: another volume", &["a"]) else { return };
    let other = filled("badinput: another volume", &["b"]).unwrap();
    let theirs = other.path("replica-b");
    v.replica("b", theirs.to_str().unwrap(), &[]);
    let (before, before_a) = (bytes_of(&theirs), bytes_of(&v.path("replica-a")));
    refused(&v, &fresh(), WRONG_VOLUME, &["replica b", "volume"]);
    refused(&v, &How::usual(), WRONG_VOLUME, &["replica b", "volume"]);
    // With the state of the one and only the replica of the other.
    refused(&v, &How::usual().only(&["b"]), WRONG_VOLUME, &["volume"]);
    assert!(
        bytes_of(&theirs) == before && bytes_of(&v.path("replica-a")) == before_a,
        "something was changed"
    );
}

#[test]
fn a_newer_format() {
    let Some(v) = filled("badinput: newer", &["a"]) else { return };
    let file = v.path("replica-a/volume.json");
    let text = fs::read_to_string(&file).unwrap();
    // As docs/format.md says: the checksum covers what is before it, in all versions.
    let (members, _) = text.split_once(",\n  \"blake3\"").unwrap();
    let members = members.replace("\"format_version\": 1", "\"format_version\": 99");
    assert!(!text.contains(&members), "no format version found in {text}");
    let newer = format!("{members},\n  \"blake3\": \"{}\"\n}}\n", blake3::hash(members.as_bytes()).to_hex());
    fs::write(&file, &newer).unwrap();
    let before = bytes_of(&v.path("replica-a"));
    refused(&v, &fresh(), TOO_NEW, &["replica a", "newer"]);
    refused(&v, &How::usual(), TOO_NEW, &["newer"]);
    let to = v.path("to");
    v.run(&[], &["restore", "--from", "a", "--to", to.to_str().unwrap()]).with_code(TOO_NEW).says(&["newer"]);
    assert!(bytes_of(&v.path("replica-a")) == before);
}

#[test]
fn damaged_objects_and_no_other_copy() {
    let Some(v) = filled("badinput: damaged", &["a"]) else { return };
    let a = v.path("replica-a");
    let all = segments(&a);
    let last = all.last().unwrap();
    let good = fs::read(last).unwrap();
    let object = last.file_name().unwrap().to_str().unwrap();
    let to = v.path("to");
    let restore = || v.run(&[], &["restore", "--from", "a", "--to", to.to_str().unwrap()]);
    fs::write(last, &good[..good.len() / 2]).unwrap();
    refused(&v, &fresh(), DAMAGED, &["replica a", object]);
    restore().with_code(DAMAGED).says(&[object]);
    fs::write(last, b"").unwrap();
    refused(&v, &fresh(), DAMAGED, &["replica a", object]);
    fs::write(last, &good).unwrap();
    // Near the end are index and records.
    flip_bit(last, 0.9995);
    refused(&v, &fresh(), DAMAGED, &["replica a", object]);
    fs::write(last, &good).unwrap();
    let volume = a.join("volume.json");
    let text = fs::read(&volume).unwrap();
    fs::write(&volume, &text[..text.len() / 2]).unwrap();
    let before = bytes_of(&a);
    refused(&v, &fresh(), DAMAGED, &["replica a", "volume.json"]);
    assert!(bytes_of(&a) == before);
    fs::write(&volume, &text).unwrap();
    v.mount_as(&fresh()).unmount();
    let _ = fs::remove_dir_all(&to);
    restore().ok();
}

#[test]
fn nobody_answers() {
    let Some(mut v) = Volume::new("badinput: unreachable") else { return };
    let mut server = S3Server::start();
    v.spec(&server.spec("off", "x", &[]));
    server.http.stop();
    let started = Instant::now();
    refused(&v, &How::usual(), UNREACHABLE, &["replica off"]);
    v.run(&[], &["init"]).with_code(UNREACHABLE).says(&["off"]);
    let to = v.path("to");
    v.run(&[], &["restore", "--from", "off", "--to", to.to_str().unwrap()])
        .with_code(UNREACHABLE)
        .says(&["off"]);
    assert!(started.elapsed() < LIMIT);
}

#[test]
fn wrong_credentials_and_no_bucket() {
    let Some(mut v) = Volume::new("badinput: credentials") else { return };
    let server = S3Server::start();
    let mut options = S3Server::options(&server.http.url());
    options.retain(|(k, _)| k != "secret_access_key");
    options.push(("secret_access_key".into(), "wrong-but-secret".into()));
    let wrong: Vec<_> = options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    v.replica("locked", &format!("s3://{BUCKET}/x"), &wrong);
    let failed = refused(&v, &How::usual(), UNREACHABLE, &["replica locked"]);
    assert!(!failed.told.contains("wrong-but-secret"), "a secret is told: {}", failed.told);
    let mut v = Volume::new("badinput: bucket").unwrap();
    let options = S3Server::options(&server.http.url());
    let right: Vec<_> = options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    v.replica("nobucket", "s3://no-such-bucket/x", &right);
    refused(&v, &How::usual(), UNREACHABLE, &["replica nobucket"]);
}

#[test]
fn impossible_mountpoints() {
    let Some(v) = filled("badinput: mountpoint", &["a"]) else { return };
    let before = bytes_of(&v.path("replica-a"));
    let attempt = |at: &Path, words: &[&str]| {
        let ran = run(&mut v.command(&fresh(), at), LIMIT);
        assert!(ran.code.is_some_and(|c| c != 0), "it was mounted");
        ran.says(words)
    };
    let file = v.path("file");
    fs::write(&file, b"").unwrap();
    attempt(&file, &["file", "not a directory"]);
    attempt(&v.path("none"), &["none", "exist"]);
    assert!(bytes_of(&v.path("replica-a")) == before);
    let mut other = Volume::new("badinput: mountpoint").unwrap();
    other.folder("o");
    let m = other.mount();
    attempt(m.root(), &["busy"]);
    assert!(bytes_of(&v.path("replica-a")) == before);
    fs::write(m.path("f"), b"the mount that was there is unharmed").unwrap();
    m.unmount();
}

#[test]
fn twice_the_same_place() {
    let Some(mut v) = Volume::new("badinput: twice") else { return };
    let a = v.folder("a");
    v.replica("b", a.to_str().unwrap(), &[]);
    refused(&v, &How::usual(), USAGE, &["a", "b", "same"]);
    let mut v = Volume::new("badinput: twice, hidden").unwrap();
    let a = v.folder("a");
    symlink(&a, v.path("link")).unwrap();
    let link = v.path("link");
    v.replica("b", link.to_str().unwrap(), &[]);
    refused(&v, &How::usual(), USAGE, &["a", "b", "same"]);
    assert!(bytes_of(&a).is_empty());
}

#[test]
fn wrong_configuration() {
    let Some(mut v) = Volume::new("badinput: configuration") else { return };
    v.folder("a");
    v.setting("cache_sise = \"1GiB\"");
    refused(&v, &How::usual(), USAGE, &["cache_sise", "cache_size"]);
    let mut v = Volume::new("badinput: configuration").unwrap();
    v.folder("a");
    v.setting("state = \"${MIRRORFS_TEST_NOT_SET}\"");
    refused(&v, &How::usual(), USAGE, &["MIRRORFS_TEST_NOT_SET"]);
    let mut v = Volume::new("badinput: configuration").unwrap();
    v.replica("s", "s3://b/x", &[("endpont", "http://127.0.0.1:1")]);
    refused(&v, &How::usual(), USAGE, &["endpont", "endpoint"]);
}

#[test]
fn in_use_twice() {
    let Some(mut v) = Volume::new("badinput: in use") else { return };
    v.folder("a");
    let m = v.mount();
    let ran = run(
        &mut v.command(&How::usual(), &{
            let p = v.path("second");
            fs::create_dir(&p).unwrap();
            p
        }),
        LIMIT,
    );
    let pid = m.pid().to_string();
    ran.with_code(IN_USE).says(&[&pid]);
    fs::write(m.path("f"), b"unharmed").unwrap();
    m.sync();
    m.unmount();
}

#[test]
fn the_newer_writer_wins_and_the_older_says_so() {
    let Some(mut v) = Volume::new("badinput: fenced") else { return };
    v.folder("a");
    let old = v.mount();
    fs::write(old.path("f"), b"1").unwrap();
    old.sync();
    // It may be at work, so nobody takes over by mistake; and nothing is changed by asking.
    let before = bytes_of(&v.path("replica-a"));
    let pid = old.pid().to_string();
    refused(&v, &fresh(), IN_USE, &["in use", &format!("process {pid}"), "--takeover", "Unmount it there"]);
    assert!(bytes_of(&v.path("replica-a")) == before);
    v.mount_as(&How::usual().state("reader").arg("--read-only")).unmount();
    let new = v.mount_as(&fresh().arg("--takeover"));
    assert_eq!(fs::read(new.path("f")).unwrap(), b"1");
    fs::write(new.path("g"), b"2").unwrap();
    new.sync();
    let until = Instant::now() + Duration::from_secs(60);
    let error = loop {
        match fs::write(old.path("late"), b"3") {
            Err(e) => break e,
            Ok(()) => assert!(Instant::now() < until, "the older writer never notices"),
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    let status = old.status();
    assert!(
        status["read_only"].as_str().is_some_and(|why| why.contains("epoch") || why.contains("writer")),
        "{status}"
    );
    assert_eq!(fs::read(old.path("f")).unwrap(), b"1");
    assert_eq!(fs::read(new.path("g")).unwrap(), b"2");
    new.sync();
    new.unmount();
    // Its state is refused for good, with a way out; the one that ended well is let go on anywhere.
    old.unmount();
    let state = v.path("state");
    refused(&v, &How::usual(), IN_USE, &["claimed by", "mirrorfs salvage --state", state.to_str().unwrap()]);
    refused(&v, &How::usual().arg("--takeover"), IN_USE, &["mirrorfs salvage"]);
    v.mount_as(&fresh().state("next")).unmount();
}

#[test]
fn nothing_there_and_not_overwriting() {
    let Some(v) = filled("badinput: restore", &["a"]) else { return };
    let empty = v.path("empty");
    fs::create_dir(&empty).unwrap();
    let to = v.path("to");
    let (from, into) = (empty.to_str().unwrap(), to.to_str().unwrap());
    run(mirrorfs().args(["restore", "--from", from, "--to", into]), LIMIT).with_code(NO_VOLUME).says(&[from]);
    assert!(bytes_of(&empty).is_empty());
    v.run(&[], &["restore", "--from", "a", "--to", into]).ok();
    fs::write(to.join("f1"), b"mine").unwrap();
    let again = v.run(&[], &["restore", "--from", "a", "--to", into]);
    assert!(again.code.is_some_and(|c| c != 0), "it overwrote");
    again.says(&["f", "--overwrite"]);
    assert_eq!(fs::read(to.join("f1")).unwrap(), b"mine");
    v.run(&[], &["restore", "--from", "a", "--to", into, "--overwrite"]).ok();
    assert_eq!(fs::read(to.join("f1")).unwrap(), Content::new(4).take(100_000));
    // A part of it, and a listing.
    let part = v.path("part");
    v.run(&[], &["restore", "--from", "a", "--to", part.to_str().unwrap(), "f2"]).ok();
    assert_eq!(bytes_of(&part).keys().map(|p| p.to_str().unwrap()).collect::<Vec<_>>(), ["f2"]);
    let listed = v.run(&[], &["restore", "--from", "a", "--list"]).ok().text();
    assert!((0..5).all(|i| listed.contains(&format!("f{i}"))), "{listed}");
}

#[test]
fn a_full_disk() {
    if !is_root() {
        return println!("SKIP: badinput: full disk: needs root, for a small filesystem");
    }
    let Some(mut v) = Volume::new("badinput: full disk") else { return };
    let mut server = S3Server::start();
    v.spec(&server.spec("s", "x", &[]));
    let state = v.path("state");
    fs::create_dir(&state).unwrap();
    let small = Small::mount(&state, "128m");
    let m = v.mount();
    fs::write(m.path("before"), Content::new(0).take(500_000)).unwrap();
    m.sync();
    server.http.stop();
    // Nothing can be evicted now, so it must fill up; slowly perhaps, but not for ever.
    let started = Instant::now();
    let mut safe = Vec::new();
    let mut ended = None;
    for i in 0..300_u64 {
        let attempt = || -> std::io::Result<()> {
            let mut f = fs::File::create(m.path(format!("f{i}")))?;
            f.write_all(&Content::new(i * 4).take(1 << 20))?;
            f.sync_all()
        };
        match attempt() {
            Ok(()) => safe.push(i),
            Err(e) => {
                ended = Some(e);
                break;
            }
        }
    }
    let ended = ended.expect("300 MiB fit into 128 MiB");
    assert_eq!(ended.raw_os_error(), Some(libc::ENOSPC), "{ended}");
    assert!(started.elapsed() < Duration::from_secs(150), "{:?}", started.elapsed());
    println!("{} MiB fit, refused after {:?}", safe.len(), started.elapsed());
    assert!(safe.len() >= 20, "only {} MiB fit", safe.len());
    // What only this disk has. (What the stopped replica has too may have been evicted to make room.)
    let right = |m: &support::mount::Mount| {
        for i in &safe {
            assert!(fs::read(m.path(format!("f{i}"))).unwrap() == Content::new(i * 4).take(1 << 20), "f{i}");
        }
    };
    // What was acknowledged is there, also after a crash on the full disk.
    m.kill9();
    let m = v.mount();
    right(&m);
    // Space comes back when the replica does.
    server.http.restart();
    m.sync();
    // Not in the same moment: what the replica has taken over is yet to be removed here.
    wait_until(LIMIT, "writing works again", || {
        // An error that only close reports is seen by nobody but a sync.
        fs::write(m.path("after"), Content::new(8).take(5 << 20)).is_ok()
            && fs::File::open(m.path("after")).unwrap().sync_all().is_ok()
    });
    m.sync();
    right(&m);
    assert!(fs::read(m.path("before")).unwrap() == Content::new(0).take(500_000));
    m.unmount();
    drop(small);
}

/// A small filesystem in memory.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(at: &'a Path, size: &str) -> Self {
        let options = format!("size={size},mode=700");
        run(std::process::Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(at), LIMIT)
            .ok();
        Self(at)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0).output();
    }
}
