//! Other users of the machine, and those who write what we show: what they may read, plant, and
//! paint on a terminal.
//!
//! Most of it needs root, which becomes another user.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::ffi::{CString, OsStr};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use mirrorfs::format::volume::Claim;
use mirrorfs::ids::Epoch;

use support::mount::{LIMIT, detach, is_mounted};
use support::run::{Ran, is_root, mirrorfs, run};

/// The user `nobody`: in every list of users, as fusermount3 wants it.
const OTHER: u32 = 65534;
/// More than the size from which objects are written past the cache.
const LARGE: usize = 3 << 20;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A folder that everybody may enter, with a mountpoint `m` and a program that everybody may run.
struct World {
    dir: tempfile::TempDir,
    mounts: Vec<PathBuf>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.mounts.iter().for_each(|path| detach(path));
    }
}

impl World {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("mfu").tempdir().unwrap();
        chmod(dir.path(), 0o755);
        fs::create_dir(dir.path().join("m")).unwrap();
        Self { dir, mounts: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    /// `mirrorfs ARGS`, here, with a umask that forbids nothing.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", r#"umask 0; exec "$@""#, "sh"]).arg(mirrorfs().get_program()).args(args);
        for (name, value) in mirrorfs().get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.env("XDG_STATE_HOME", self.path("xdg")).env_remove("XDG_RUNTIME_DIR");
        command.current_dir(self.dir.path());
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        run(&mut self.command(args), LIMIT)
    }

    /// The same as another user, with a copy of the program: where it was built that user may not
    /// enter.
    fn run_as(&self, user: u32, args: &[&str]) -> Ran {
        let program = self.path("program");
        if !program.exists() {
            fs::copy(mirrorfs().get_program(), &program).unwrap();
            chmod(&program, 0o755);
        }
        let mut command = Command::new(program);
        command.args(args).env("HOME", self.path("home")).env("MIRRORFS_FREE_SPACE_RATIO", "0");
        command.env_remove("XDG_RUNTIME_DIR").env_remove("XDG_STATE_HOME").current_dir(self.dir.path());
        run(command.uid(user).gid(user), LIMIT)
    }

    /// Mounts `m` in the background.
    fn mount(&mut self, more: &[&str]) -> Ran {
        self.mounts.push(self.path("m"));
        self.run(&[&["mount", "m", "--replica", "a=r", "--state", "state"], more].concat())
    }

    fn shell(&self, text: &str) {
        run(Command::new("sh").args(["-ec", text]).current_dir(self.dir.path()), LIMIT).ok();
    }
}

/// Everything at and below `path` that its owner does not have alone.
fn open_below(path: &Path) -> Vec<String> {
    walkdir::WalkDir::new(path)
        .into_iter()
        .map(Result::unwrap)
        .filter(|e| !e.file_type().is_symlink() && mode(e.path()) & 0o077 != 0)
        .map(|e| format!("{:04o} {}", mode(e.path()), e.path().display()))
        .collect()
}

fn needs_root(test: &str) -> bool {
    if !is_root() {
        println!("SKIP: {test}: only root can become another user");
    }
    is_root()
}

#[test]
fn what_is_stored_is_its_owner_s_alone_and_modes_in_the_mount_are_as_they_were_asked_for() {
    let mut world = World::new();
    world.mount(&[]).ok();
    let secret: Vec<u8> = (0..LARGE).map(|i| (i * 31 % 251) as u8).collect();
    fs::write(world.path("m/large"), &secret).unwrap();
    fs::write(world.path("m/secret"), "only root may read this").unwrap();
    world.shell(
        "cd m; chmod 600 secret; umask 022; touch f; mkdir d; mkfifo p; umask 0; touch f0; mkdir d0; umask 027; \
         mkdir d027; touch f027; chmod 4755 f; chmod 1777 d0; chmod 640 f0; ln -s f link",
    );
    let wanted = [
        ("secret", 0o600),
        ("f", 0o4755),
        ("d", 0o755),
        ("p", 0o644),
        ("f0", 0o640),
        ("d0", 0o1777),
        ("d027", 0o750),
        ("f027", 0o640),
    ];
    for (name, bits) in wanted {
        assert_eq!(mode(&world.path("m").join(name)), bits, "{name}");
    }
    world.run(&["sync", "m", "--timeout", "170"]).ok();
    for folder in ["r", "state"] {
        assert!(world.path(folder).join("").is_dir());
        assert_eq!(open_below(&world.path(folder)), Vec::<String>::new());
    }
    if is_root() {
        assert_eq!(open_below(Path::new("/run/mirrorfs")), Vec::<String>::new());
    }
    world.run(&["umount", "m", "--wait"]).ok();
    // With the checkpoint that an unmount makes, and what a second mount adds.
    let told = world.mount(&[]).ok();
    assert!(!told.stderr.contains("warning"), "{}", told.stderr);
    fs::write(world.path("m/more"), &secret).unwrap();
    world.run(&["umount", "m", "--wait"]).ok();
    assert_eq!(open_below(&world.path("r")), Vec::<String>::new());
    assert_eq!(open_below(&world.path("state")), Vec::<String>::new());

    world.run(&["restore", "--from", "r", "--to", "out"]).ok();
    for (name, bits) in wanted {
        assert_eq!(mode(&world.path("out").join(name)), bits, "{name} restored");
    }
    if needs_root("restoring as another user") {
        fs::create_dir(world.path("theirs")).unwrap();
        chown(world.path("theirs"), Some(OTHER), Some(OTHER)).unwrap();
        let ran = world.run_as(OTHER, &["restore", "--from", "r", "--to", "theirs/out"]);
        assert_ne!(ran.code, Some(0), "{}", ran.stderr);
        assert!(!world.path("theirs/out/secret").exists());
    }
}

#[test]
fn a_folder_that_is_open_to_others_is_told_once_for_each_mount() {
    let mut world = World::new();
    for (folder, bits) in [("r", 0o750), ("state", 0o755)] {
        fs::create_dir(world.path(folder)).unwrap();
        chmod(&world.path(folder), bits);
    }
    let told = world.mount(&["--quiet"]).ok().stderr;
    let close = |name: &str| format!("close it with: chmod -R go-rwx {}", world.path(name).display());
    assert!(told.contains("warning: the folder of replica a"), "{told}");
    assert!(told.contains("is open to its group (mode 0750), who may read"), "{told}");
    assert!(
        told.contains("warning: the state folder") && told.contains("every user of this machine"),
        "{told}"
    );
    assert!(told.contains(&close("r")) && told.contains(&close("state")), "{told}");
    let log = fs::read_to_string(world.path("state/daemon.log")).unwrap();
    assert!(log.contains("WARN") && log.contains("the folder of replica a"), "{log}");
    // What is new is private all the same.
    let open: Vec<_> = open_below(&world.path("r")).into_iter().skip(1).collect();
    assert_eq!(open, Vec::<String>::new());
    let status = world.run(&["status", "m"]).ok();
    assert!(!status.text().contains("open to") && !status.stderr.contains("open to"), "{}", status.text());
    let added = world.path("r2");
    fs::create_dir(&added).unwrap();
    chmod(&added, 0o777);
    world.run(&["replica", "attach", "b=r2", "m"]).ok().says(&["replica b", "may change it"]);
    world.run(&["umount", "m"]).ok();
    let init = ["init", "--replica", "a=r3"];
    fs::create_dir(world.path("r3")).unwrap();
    chmod(&world.path("r3"), 0o755);
    world.run(&init).ok().says(&["warning: the folder of replica a", "(mode 0755)"]);
}

#[test]
fn a_state_folder_that_others_may_write_to_is_refused() {
    let mut world = World::new();
    fs::create_dir(world.path("state")).unwrap();
    chmod(&world.path("state"), 0o777);
    let refused = world.mount(&[]).with_code(1);
    refused.says(&["cannot use the state folder", "other users may write to it (mode 0777)", "chmod go-rwx"]);
    assert!(!is_mounted(&world.path("m")) && !world.path("r").exists());
    if needs_root("a state folder of another user") {
        chmod(&world.path("state"), 0o700);
        chown(world.path("state"), Some(OTHER), None).unwrap();
        let refused = world.mount(&[]).with_code(1);
        refused.says(&["cannot use the state folder", "belongs to user 65534, not to user 0", "chown -R 0"]);
        assert!(!is_mounted(&world.path("m")));
    }
}

/// Name of the entry of a mountpoint.
fn entry_name(mountpoint: &Path) -> String {
    blake3::hash(mountpoint.as_os_str().as_bytes()).to_hex()[..32].to_owned()
}

/// Something planted in the temporary folder by another user; removed when dropped.
struct Planted(PathBuf);

impl Drop for Planted {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Planted {
    /// Where an entry of that user for `mountpoint` lies; its folder is made.
    fn place(mountpoint: &Path) -> Self {
        let folder = PathBuf::from(format!("/tmp/mirrorfs-{OTHER}"));
        if fs::create_dir(&folder).is_ok() {
            chown(&folder, Some(OTHER), Some(OTHER)).unwrap();
            chmod(&folder, 0o700);
        }
        Self(folder.join(entry_name(mountpoint)))
    }

    fn write(&self, text: &str) {
        let _ = fs::remove_file(&self.0);
        fs::write(&self.0, text).unwrap();
        chown(&self.0, Some(OTHER), Some(OTHER)).unwrap();
        chmod(&self.0, 0o600);
    }

    fn fifo(&self) {
        let _ = fs::remove_file(&self.0);
        run(Command::new("mkfifo").arg(&self.0), LIMIT).ok();
        chown(&self.0, Some(OTHER), Some(OTHER)).unwrap();
    }
}

#[test]
fn an_entry_that_another_user_planted_is_not_taken() {
    if !needs_root("an_entry_that_another_user_planted_is_not_taken") {
        return;
    }
    let mut world = World::new();
    world.mount(&[]).ok();
    let m = world.path("m");
    let own = Path::new("/run/mirrorfs").join(entry_name(&m));
    // As after a crash of the machine's temporary files, or of a mount in a container.
    let entry = fs::read_to_string(&own).unwrap();
    fs::remove_file(&own).unwrap();
    let planted = Planted::place(&m);
    // A process that does not run: then umount takes the mount away although it is in use.
    planted.write(&format!("{} /nowhere {}\n", m.display(), i32::MAX));
    let file = fs::File::create(m.join("open")).unwrap();
    let ran = world.run(&["umount", "m"]);
    assert_ne!(ran.code, Some(0), "{}{}", ran.text(), ran.stderr);
    assert!(is_mounted(&m), "it was detached although a program uses it");
    fs::write(m.join("still"), "alive").unwrap();

    planted.fifo();
    let ran = run(&mut world.command(&["status"]), Duration::from_secs(60));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("cannot tell which daemon serves"), "{}", ran.stderr);

    drop(file);
    fs::write(&own, entry).unwrap();
    chmod(&own, 0o600);
    world.run(&["umount", "m"]).ok();
}

/// A mount of another user, as the kernel shows it; nobody serves it. Taken away when dropped.
struct Theirs {
    path: PathBuf,
    _device: fs::File,
}

impl Drop for Theirs {
    fn drop(&mut self) {
        detach(&self.path);
    }
}

impl Theirs {
    fn mount(path: &Path) -> Self {
        let device = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id={OTHER},group_id={OTHER}", device.as_raw_fd());
        let text = |bytes: &[u8]| CString::new(bytes).unwrap();
        let (at, options) = (text(path.as_os_str().as_bytes()), text(options.as_bytes()));
        let flags = libc::MS_NOSUID | libc::MS_NODEV;
        // SAFETY: all strings end with a zero byte and outlive the call.
        let mounted = unsafe {
            libc::mount(c"x".as_ptr(), at.as_ptr(), c"fuse.mirrorfs".as_ptr(), flags, options.as_ptr().cast())
        };
        assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
        Self { path: path.to_owned(), _device: device }
    }
}

/// A socket of another user in `state` that answers every question with an error of these bytes.
fn answering(state: &Path, answer: &'static str) {
    let (path, (listening, listens)) = (state.join("control.sock"), mpsc::channel());
    thread::spawn(move || {
        // SAFETY: takes numbers. Called past libc, which would change the user of every thread of
        // the process.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, -1, OTHER, -1) }, 0);
        let listener = UnixListener::bind(&path).unwrap();
        listening.send(()).unwrap();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let (head, n) = ("HTTP/1.1 500 Internal Server Error\r\nconnection: close", answer.len());
            let _ = write!(stream, "{head}\r\ncontent-length: {n}\r\n\r\n{answer}");
        }
    });
    listens.recv().unwrap();
}

#[test]
fn root_asks_another_user_s_daemon_but_not_what_that_user_points_to() {
    if !needs_root("root_asks_another_user_s_daemon_but_not_what_that_user_points_to") {
        return;
    }
    let mut world = World::new();
    world.mount(&[]).ok();
    let (place, state) = (world.path("theirs"), world.path("their-state"));
    for folder in [&place, &state] {
        fs::create_dir(folder).unwrap();
        chown(folder, Some(OTHER), Some(OTHER)).unwrap();
    }
    let _theirs = Theirs::mount(&place);
    let planted = Planted::place(&place);
    let entry = |state: &Path, pid: u32| format!("{} {} {pid}\n", place.display(), state.display());
    let ask = |args: &[&str]| run(mirrorfs().args(args), Duration::from_secs(60));
    let shown = place.to_str().unwrap();

    // Their daemon is asked, and what it says paints nothing.
    answering(&state, HOSTILE);
    planted.write(&entry(&state, std::process::id()));
    let ran = ask(&["status"]).ok();
    assert!(ran.stderr.contains(r"x\x1b[2J\x07\x9b1m\u{202e}y"), "{}", ran.stderr);
    harmless(&ran.stderr);

    // Their entry leads to the socket of root's own daemon, which would obey root.
    planted.write(&entry(&world.path("state"), std::process::id()));
    let ran = ask(&["umount", shown]);
    assert_ne!(ran.code, Some(0), "{}{}", ran.text(), ran.stderr);
    assert!(ran.stderr.contains("is served by user 0, not by user 65534"), "{}", ran.stderr);
    assert!(is_mounted(&world.path("m")), "root's volume was unmounted through another user's entry");

    // Instead of an entry a FIFO, a link, and a folder that is not theirs alone.
    let unknown = format!("cannot tell which daemon serves {shown}");
    planted.fifo();
    ask(&["status"]).ok().says(&[&unknown]);
    fs::remove_file(&planted.0).unwrap();
    symlink("/dev/zero", &planted.0).unwrap();
    ask(&["status"]).ok().says(&[&unknown]);
    planted.write(&entry(&state, std::process::id()));
    chmod(&planted.0, 0o666);
    ask(&["status"]).ok().says(&[&unknown]);
    world.run(&["umount", "m"]).ok();
}

/// What a terminal would obey: the first characters of control sequences in both forms, a bell,
/// reversed writing.
const HOSTILE: &str = "x\u{1b}[2J\u{7}\u{9b}1m\u{202e}y\nmirrorfs: z";

#[track_caller]
fn harmless(text: &str) {
    let bad = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(!text.contains(bad), "{text:?}");
    assert!(!text.contains("\nmirrorfs: z"), "a line break from outside begins a message: {text:?}");
}

#[test]
fn what_comes_from_outside_paints_nothing_on_the_terminal_or_in_the_log() {
    let mut world = World::new();
    world.mount(&[]).ok();
    let name = OsStr::new(HOSTILE);
    fs::write(world.path("m").join(name), "content").unwrap();
    world.run(&["sync", "m", "--timeout", "170"]).ok();
    let told = world.run(&["restore", "--from", "r", "--list"]).ok().text();
    harmless(&told);
    assert!(told.contains(r"x\x1b[2J\x07"), "{told}");
    let json = world.run(&["restore", "--from", "r", "--list", "--json"]).ok().text();
    harmless(&json);
    let all: Vec<serde_json::Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(all.len(), 2, "{json}");

    // Two files of the same name and one that exists: restore complains of it by name.
    fs::create_dir(world.path("out")).unwrap();
    fs::write(world.path("out").join(name), "other").unwrap();
    let ran = world.run(&["restore", "--from", "r", "--to", "out"]);
    assert_ne!(ran.code, Some(0));
    harmless(&ran.stderr);
    assert!(ran.stderr.contains(r"\x1b[2J"), "{}", ran.stderr);
    world.run(&["umount", "m"]).ok();

    // The claim of the last writer, who did not unmount, names its host.
    let mut claims = 0;
    for entry in fs::read_dir(world.path("r/epochs")).unwrap() {
        let path = entry.unwrap().path();
        if path.to_string_lossy().contains("released") {
            fs::remove_file(path).unwrap();
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let claim = (0..100).find_map(|epoch| Claim::decode(&bytes, Epoch(epoch)).ok()).unwrap();
        fs::write(&path, Claim { host: HOSTILE.into(), ..claim }.encode().unwrap()).unwrap();
        claims += 1;
    }
    assert!(claims > 0);
    fs::rename(world.path("state"), world.path("state-before")).unwrap();
    let ran = world.mount(&[]);
    assert_ne!(ran.code, Some(0), "{}", ran.text());
    harmless(&ran.stderr);
    assert!(ran.stderr.contains(r"\x1b[2J"), "the host is named: {}", ran.stderr);
    let foreground = world.mount(&["--foreground"]);
    assert_ne!(foreground.code, Some(0));
    harmless(&foreground.stderr);

    // An argument that a script passed on, in what clap says of it.
    let ran = world.run(&["status", "--no-such\u{1b}[2J"]).with_code(2);
    harmless(&ran.stderr);
    assert!(ran.stderr.contains(r"\x1b[2J") || !ran.stderr.contains("[2J"), "{}", ran.stderr);
}
