//! Behaviour that applications and suites such as xfstests look at, shown twice: in a directory of ext4 and in a mount of
//! mirrorfs, and compared line by line. What differs must be in [`deviations::ALL`], with its reason, and in docs/semantics.md.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod acls;
mod attrs;
mod content;
mod deviations;
mod handles;
mod holes;
mod names;
mod privileges;
mod sys;
mod xattrs;

#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;

use support::mount::{How, Volume};
use sys::Case;

type Run = fn(&mut Case);

fn all_cases() -> Vec<(&'static str, Run)> {
    [
        names::CASES,
        attrs::CASES,
        privileges::CASES,
        content::CASES,
        holes::CASES,
        handles::CASES,
        xattrs::CASES,
        acls::CASES,
    ]
    .concat()
}

/// A directory of ext4: below the temporary folder when that is ext4, else in an image of our own.
struct Reference {
    dir: PathBuf,
    image: Option<PathBuf>,
    /// It may be remounted: nobody else uses it.
    own: bool,
}

impl Reference {
    fn new(volume: &Volume) -> Option<Self> {
        let dir = volume.path("ext4");
        fs::create_dir(&dir).unwrap();
        let image = volume.path("ext4.img");
        let made = fs::File::create(&image).and_then(|f| f.set_len(1 << 30)).is_ok()
            && works(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image))
            && works(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&dir));
        if made {
            fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).unwrap();
            return Some(Self { dir, image: Some(image), own: true });
        }
        let _ = fs::remove_file(&image);
        (sys::statfs_type(&dir) == 0xef53).then_some(Self { dir, image: None, own: false })
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        if let Some(image) = &self.image {
            let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
            let _ = fs::remove_file(image);
        }
    }
}

fn works(command: &mut Command) -> bool {
    command.output().is_ok_and(|o| o.status.success())
}

fn is_root() -> bool {
    unsafe { libc::geteuid() == 0 }
}

/// What one case says in one directory.
fn told(name: &str, run: Run, root: &Path, may_remount: bool) -> Vec<String> {
    let dir = root.join(name);
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).unwrap();
    let mut case = Case::new(dir, root.to_owned(), may_remount);
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(&mut case))) {
        let text = panic.downcast_ref::<String>().cloned();
        case.note(
            "panicked",
            text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default(),
        );
    }
    case.lines
}

fn key(line: &str) -> &str {
    line.split_once(" = ").map_or(line, |(key, _)| key)
}

/// Differences of one case, as (key, ext4, mirrorfs).
fn differences(ext4: &[String], ours: &[String]) -> Vec<(String, String, String)> {
    let table = |lines: &[String]| -> BTreeMap<String, String> {
        lines
            .iter()
            .map(|l| (key(l).to_owned(), l.split_once(" = ").map_or(String::new(), |(_, v)| v.to_owned())))
            .collect()
    };
    let (a, b) = (table(ext4), table(ours));
    let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let get =
        |t: &BTreeMap<String, String>, k: &String| t.get(k).cloned().unwrap_or_else(|| "(nothing)".into());
    keys.into_iter().map(|k| (k.clone(), get(&a, k), get(&b, k))).filter(|(_, x, y)| x != y).collect()
}

#[test]
fn every_case_is_as_on_ext4() {
    let Some(mut volume) = Volume::new("every_case_is_as_on_ext4") else { return };
    if !is_root() {
        return println!("SKIP: becoming other users and dropping caches needs root");
    }
    fs::set_permissions(volume.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    volume.folder("a");
    let Some(reference) = Reference::new(&volume) else {
        return println!("SKIP: no ext4 to compare with: neither the temporary folder nor a loop mount");
    };
    let mount = volume.mount_as(&How::usual().arg("-o").arg("allow_other,suid,dev,acl"));
    let only = std::env::var("CASE").ok();
    let mut bad = Vec::new();
    for (name, run) in all_cases() {
        if only.as_ref().is_some_and(|o| !name.contains(o.as_str())) {
            continue;
        }
        let started = std::time::Instant::now();
        let ext4 = told(name, run, &reference.dir, reference.own);
        let ours = told(name, run, mount.root(), reference.own);
        if only.is_some() {
            ext4.iter().for_each(|l| println!("{name}: ext4: {l}"));
        }
        println!("{name}: {} lines, {:?}", ext4.len(), started.elapsed());
        let mut found = differences(&ext4, &ours);
        for d in deviations::ALL.iter().filter(|d| d.case == name) {
            let before = found.len();
            found.retain(|(key, _, ours)| !d.covers(key, ours));
            if found.len() == before && !d.sometimes {
                bad.push(format!("{name}: {}: no longer differs as listed: strike it off", d.key));
            }
        }
        bad.extend(found.into_iter().map(|(k, x, y)| format!("{name}: {k}: ext4 {x}, mirrorfs {y}")));
    }
    assert!(bad.is_empty(), "{} differences from ext4:\n{}", bad.len(), bad.join("\n"));
    mount.unmount();
}

/// The suite's outcome for each of its tests.
fn pjdfstest(tool: &str, dir: &Path, volume: &Volume, remount: bool) -> BTreeMap<String, String> {
    let conf = volume.path("pjdfstest.toml");
    fs::write(&conf, format!("{}allow_remount = {remount}\n", support::PJDFSTEST_TOML)).unwrap();
    // As a shell would, but without looking for a helper of the filesystem's.
    let bin = volume.path("bin");
    let _ = fs::create_dir(&bin);
    fs::write(bin.join("mount"), "#!/bin/sh\nPATH=${PATH#*:} exec mount -i \"$@\"\n").unwrap();
    fs::set_permissions(bin.join("mount"), PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(tool);
    command.env("PATH", path).arg("-c").arg(&conf).arg("-p").arg(dir).arg("-s").arg("/dev/shm");
    let out = command.output().unwrap();
    let told = String::from_utf8_lossy(&out.stdout).into_owned();
    let outcome = |line: &str| -> Option<(String, String)> {
        let mut words = line.split_whitespace();
        let (name, how) = (words.next()?, words.next()?);
        (name.contains("::") && words.next().is_none() && matches!(how, "ok" | "FAILED" | "skipped"))
            .then(|| (name.to_owned(), how.to_owned()))
    };
    let all: BTreeMap<_, _> = told.lines().filter_map(outcome).collect();
    assert!(all.len() > 390, "only {} outcomes: {told}", all.len());
    all
}

#[test]
fn pjdfstest_says_the_same_as_on_ext4() {
    let Some(mut volume) = Volume::new("pjdfstest_says_the_same_as_on_ext4") else { return };
    let tool = std::env::var("PJDFSTEST").unwrap_or_else(|_| "pjdfstest".into());
    if !is_root() || Command::new(&tool).arg("--help").output().is_err() {
        return println!("SKIP: needs root and pjdfstest (cargo install pjdfstest)");
    }
    fs::set_permissions(volume.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    volume.folder("a");
    let Some(reference) = Reference::new(&volume) else {
        return println!("SKIP: no ext4 to compare with: neither the temporary folder nor a loop mount");
    };
    let mount = volume.mount_as(&How::usual().arg("-o").arg("allow_other,suid,dev,acl"));
    let ext4 = pjdfstest(&tool, &reference.dir, &volume, reference.own);
    let mut ours = pjdfstest(&tool, mount.root(), &volume, reference.own);
    // Asks the C library for LINK_MAX, which knows the limits of some filesystems by their magic numbers and has none
    // for FUSE.
    assert_eq!(ours.insert("link::link_count_max".into(), "ok".into()).unwrap(), "skipped");
    assert_eq!(ext4, ours);
    let count = |how: &str| ours.values().filter(|v| *v == how).count();
    println!("{} ok, {} skipped, {} failed, as on ext4", count("ok"), count("skipped"), count("FAILED"));
    // Six tests leave a file open for writing and then cannot remount, wherever they run; nothing else may fail.
    assert!(ours.iter().all(|(name, how)| how != "FAILED" || name.contains("erofs")));
    mount.unmount();
}
