//! The program as a person runs it: messages and exit codes that need no mount.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop here")]

use std::path::Path;
use std::process::{Command, Output};

struct World {
    dir: tempfile::TempDir,
}

struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["home", "m", "a", "b"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        World { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn file(&self, name: &str, text: &str) {
        std::fs::write(self.path().join(name), text).unwrap();
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, &[])
    }

    /// Runs in the world's folder with nothing of this process's environment but the path.
    fn run_with(&self, arguments: &[&str], vars: &[(&str, &str)]) -> Ran {
        let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_mirrorfs"))
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.path().join("home"))
            .envs(vars.iter().copied())
            .current_dir(self.path())
            .output()
            .unwrap();
        let real = self.path().canonicalize().unwrap().display().to_string();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(&real, "ROOT");
        Ran { code: status.code().unwrap(), out: text(stdout), err: text(stderr) }
    }

    /// Runs what must be refused as a wrong usage, with this message, and leave nothing behind.
    fn refuse(&self, arguments: &[&str], message: &str) {
        let ran = self.run(arguments);
        assert_eq!((ran.code, ran.err.trim_end(), ran.out.as_str()), (2, message, ""), "{arguments:?}");
        assert!(!self.path().join("home/.local").exists(), "{arguments:?} made a state folder");
        for replica in ["a", "b"] {
            let left = std::fs::read_dir(self.path().join(replica)).unwrap().count();
            assert_eq!(left, 0, "{arguments:?} wrote to replica {replica}");
        }
    }
}

#[test]
fn help_and_version_are_no_errors() {
    let world = World::new();
    for arguments in [&["--help"][..], &["mount", "--help"], &["help", "sync"], &["--version"], &["version"]]
    {
        let ran = world.run(arguments);
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{arguments:?}");
        assert!(!ran.out.is_empty());
    }
    let ran = world.run(&["version", "--json"]);
    let version: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn a_wrong_command_line_ends_with_2() {
    let world = World::new();
    for arguments in [
        &[][..],
        &["mount"],
        &["explode"],
        &["mount", "m", "--no-such-flag"],
        &["sync", "m", "--replicas", "most"],
        &["sync", "m", "--timeout", "soon"],
        &["restore", "--from", "a"],
    ] {
        let ran = world.run(arguments);
        assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{arguments:?}");
        assert!(ran.err.contains("Usage") || ran.err.contains("error:"), "{arguments:?}: {}", ran.err);
    }
}

#[test]
fn to_take_over_is_said_at_the_moment() {
    let world = World::new();
    world.file("m.toml", "takeover = true\n[replica.a]\nurl = \"a\"\n");
    let ran = world.run(&["mount", "m", "--config", "m.toml"]);
    assert!(ran.code == 2 && ran.err.contains("m.toml:1: takeover: unknown key"), "{}", ran.err);
    let ran = world.run_with(&["mount", "m", "--replica", "a"], &[("MIRRORFS_OPTIONS", "takeover")]);
    assert!(ran.code == 2 && ran.err.contains("takeover must be given on the command line"), "{}", ran.err);
}

#[test]
fn a_wrong_configuration_ends_with_2_and_touches_nothing() {
    let world = World::new();
    world.file("key.toml", "[replica.a]\nurl = \"a\"\n\n[mount]\nalow_other = true\n");
    world.file("var.toml", "[replica.a]\nurl = \"s3://${MIRROR_BUCKET}/x\"\n");
    world.file("opt.toml", "[replica.a]\nurl = \"s3://b/x\"\nregoin = \"eu\"\n");
    world.file("size.toml", "cache_size = \"10 apples\"\n[replica.a]\nurl = \"a\"\n");
    world.file("full.toml", "fsync = \"quorum\"\n");
    for command in ["mount m", "init"] {
        for (rest, message) in [
            (
                "--config key.toml",
                "ROOT/key.toml:5: mount.alow_other: unknown key; did you mean \"allow_other\"?",
            ),
            (
                "--config var.toml",
                "ROOT/var.toml:2: replica.a.url: the variable MIRROR_BUCKET is not set (or not text); set it, or write $$ for a literal dollar sign",
            ),
            (
                "--config opt.toml",
                "ROOT/opt.toml:1: replica.a: replica a: unknown option \"regoin\" for s3, did you mean \"region\"?",
            ),
            (
                "--config size.toml",
                "ROOT/size.toml:1: cache_size: \"10 apples\" has the unknown unit \"apples\"; use B, KiB, MiB, GiB or TiB",
            ),
            (
                "--config none.toml",
                "cannot read the configuration ROOT/none.toml: No such file or directory (os error 2)",
            ),
            (
                "--config full.toml",
                "no replica is given; name at least one with --replica [NAME=]URL or [replica.NAME] in --config FILE",
            ),
            (
                "--replica x=a --replica y=./b/../a",
                "replicas x and y are the same folder ROOT/a: losing it would lose both; give each a place of its own",
            ),
            (
                "--replica x=a --replica x=b",
                "two replicas are called x: give each a name of its own (NAME=URL)",
            ),
            (
                "--replica ftp://h",
                "--replica number 1: replica h: URL \"ftp://h\": the scheme ftp:// is none of file, s3, gs, az",
            ),
            (
                "--replica a --block-size 100000",
                "--block-size: \"100000\" is not a power of two; use one, such as \"256KiB\" or \"1MiB\"",
            ),
        ] {
            let arguments: Vec<&str> = command.split(' ').chain(rest.split(' ')).collect();
            world.refuse(&arguments, &format!("mirrorfs: {message}"));
        }
    }
}

#[test]
fn a_wrong_mountpoint_ends_with_2_and_touches_nothing() {
    let world = World::new();
    world.file("file", "");
    for (arguments, message) in [
        (
            "mount none --replica a",
            "the mountpoint ROOT/none does not exist; create it with: mkdir -p ROOT/none",
        ),
        ("mount file --replica a", "the mountpoint ROOT/file is not a directory"),
        (
            "mount a --replica a",
            "the mountpoint ROOT/a and the replica a (ROOT/a) lie one within the other; choose another directory",
        ),
        (
            "mount /proc --replica a",
            "the mountpoint /proc is busy: proc is already mounted there; unmount it or choose another directory",
        ),
        ("mount m --replica a -o alow_other", "-o alow_other: unknown option; did you mean \"allow_other\"?"),
        ("mount m --replica a -o cache_size", "-o cache_size: needs a value: cache_size=…"),
        (
            "mount m --replica a --state a/state",
            "the state folder ROOT/a/state and the replica a (ROOT/a) lie one within the other; move one of them",
        ),
    ] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        world.refuse(&arguments, &format!("mirrorfs: {message}"));
    }
}

#[test]
fn commands_for_a_mount_say_that_there_is_none() {
    let world = World::new();
    for command in ["sync", "umount", "status"] {
        let ran = world.run(&[command, "m"]);
        assert_eq!(
            (ran.code, ran.err.as_str()),
            (9, "mirrorfs: no mirrorfs volume is mounted on m; see all with: mirrorfs status\n"),
            "{command}"
        );
    }
}

#[test]
fn flags_win_over_options_over_variables_over_the_file() {
    let world = World::new();
    world.file("m.toml", "fsync = \"file\"\n[replica.a]\nurl = \"a\"\n");
    // Each source holds a value that is refused, so that the message shows which one counted.
    let fsync = |arguments: &[&str], vars: &[(&str, &str)]| {
        let ran = world.run_with(&[&["mount", "m", "-c", "m.toml"], arguments].concat(), vars);
        assert_eq!(ran.code, 2);
        ran.err.split(" is not a level").next().unwrap().to_owned()
    };
    let variable = [("MIRRORFS_FSYNC", "variable")];
    assert_eq!(fsync(&[], &[]), "mirrorfs: ROOT/m.toml:1: fsync: \"file\"");
    assert_eq!(fsync(&[], &variable), "mirrorfs: MIRRORFS_FSYNC: \"variable\"");
    assert_eq!(fsync(&["-o", "fsync=option"], &variable), "mirrorfs: -o fsync: \"option\"");
    assert_eq!(fsync(&["-o", "fsync=option", "--fsync", "flag"], &variable), "mirrorfs: --fsync: \"flag\"");
}

#[test]
fn restore_tells_what_is_wrong_with_a_replica_by_its_code() {
    let world = World::new();
    let volume = include_str!("golden/v1-volume.json");
    let restore = |from: &str, more: &[&str]| {
        let ran = world.run(&[&["restore", "--from", from, "--to", "out"], more].concat());
        assert!(!world.path().join("out").exists(), "{from}: {}", ran.err);
        (ran.code, ran.err)
    };
    let (code, message) = restore("a", &[]);
    assert_eq!(code, 3, "{message}");
    assert!(message.contains("replica a at file://ROOT/a holds no mirrorfs volume"), "{message}");

    let newer = volume.replace("\"format_version\": 1", "\"format_version\": 999");
    let (checked, _) = newer.split_once(",\n  \"blake3\"").unwrap();
    let hash = blake3::hash(checked.as_bytes()).to_hex();
    world.file("a/volume.json", &format!("{checked},\n  \"blake3\": \"{hash}\"\n}}\n"));
    let (code, message) = restore("a", &[]);
    assert_eq!(code, 10, "{message}");

    world.file("a/volume.json", &volume.replace("zstd", "zstE"));
    let (code, message) = restore("a", &[]);
    assert_eq!(code, 7, "{message}");

    world.file("file", "");
    let (code, message) = restore("file/a", &[]);
    assert_eq!(code, 2, "{message}");

    let mut options = Vec::new();
    // Nobody listens on port 1.
    for option in
        ["endpoint=http://127.0.0.1:1", "allow_http=true", "access_key_id=k", "secret_access_key=hunter2"]
    {
        options.extend(["--replica-option", option]);
    }
    let (code, message) = restore("s3://b/x", &options);
    assert_eq!(code, 6, "{message}");
    assert!(message.contains("replica b") && !message.contains("hunter2"), "{message}");

    let (code, message) = restore("s3://b/x", &["--replica-option", "endpoint=ftp://h"]);
    assert_eq!(code, 2, "{message}");
    let (code, message) = restore("a", &["../x"]);
    assert_eq!(code, 2, "{message}");
}

#[test]
fn switches_can_be_set_by_variables() {
    let world = World::new();
    let json = |value: &str| world.run_with(&["version"], &[("MIRRORFS_JSON", value)]).out.starts_with('{');
    assert!(json("1") && json("true") && json("yes"));
    assert!(!json("0") && !json("false") && !json(""));
}

#[test]
fn the_program_works_as_a_mount_helper() {
    let world = World::new();
    let link = world.path().join("mount.mirrorfs");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_mirrorfs"), &link).unwrap();
    let ran = Command::new(&link)
        .args(["a", "m", "-o", "rw,_netdev,alow_other"])
        .current_dir(world.path())
        .output()
        .unwrap();
    assert_eq!(ran.status.code(), Some(1));
    let message = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(message, "mirrorfs: -o alow_other: unknown option; did you mean \"allow_other\"?\n");
}

#[test]
fn a_secret_is_not_repeated() {
    let world = World::new();
    world.file("m.toml", "[replica.a]\nurl = \"s3://b/x\"\nsecret_access_key = \"${KEY}\"\nregoin = \"x\"\n");
    let ran = world.run_with(&["mount", "m", "-c", "m.toml"], &[("KEY", "hunter2")]);
    assert_eq!(ran.code, 2);
    assert!(!ran.err.contains("hunter2"), "{}", ran.err);
    let ran = world.run(&["mount", "m", "--replica", "s3://user:hunter2@b/x"]);
    assert_eq!(ran.code, 2);
    assert!(!ran.err.contains("hunter2"), "{}", ran.err);
}

#[test]
fn a_benchmark_writes_what_its_documentation_says() {
    let world = World::new();
    let common =
        ["bench", "a", "--scale", "0.0001", "--rounds", "2", "--idle", "0", "--workloads", "create,remove"];
    let ran =
        world.run(&[&common[..], &["--against", "b", "--against", "m", "--json", "figures.json"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.starts_with("workload "), "{}", ran.out);
    let figures: serde_json::Value =
        serde_json::from_slice(&std::fs::read(world.path().join("figures.json")).unwrap()).unwrap();
    let doc = include_str!("../docs/performance.md");
    let documented = |object: &serde_json::Value| {
        for field in object.as_object().unwrap().keys() {
            assert!(doc.contains(&format!("`{field}`")), "docs/performance.md does not tell what {field} is");
        }
    };
    documented(&figures);
    documented(&figures["machine"]);
    documented(&figures["directories"][0]);
    documented(&figures["size"]);
    documented(&figures["rows"][0]);
    assert_eq!(figures["rows"][0]["seconds"][2].as_array().unwrap().len(), 2, "{figures}");
    assert_eq!(figures["directories"][1]["path"], "b");

    // Where it cannot write it says so, and ends with 1.
    std::fs::remove_dir(world.path().join("b")).unwrap();
    let ran = world.run(&[&common[..], &["--against", "b"]].concat());
    assert_eq!((ran.code, ran.out.as_str()), (1, ""), "{}", ran.err);
    assert!(ran.err.contains("cannot measure: make b/mirrorfs-bench."), "{}", ran.err);
    for folder in ["a", "m"] {
        assert_eq!(std::fs::read_dir(world.path().join(folder)).unwrap().count(), 0, "left in {folder}");
    }
}
