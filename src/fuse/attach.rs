//! Attaching to a directory and detaching from it: mount(2) with enough rights, `fusermount3` without.
//!
//! Owns the checks of the mountpoint and the words in which a refusal is explained. Done here and not by fuser, because
//! fuser ties "who may ask" to `allow_other`: without that it refuses what the kernel itself sends on behalf of root
//! (the times of files that it wrote back), and those times would be lost in a user's mount. The kernel checks who may
//! ask anyway.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::apart;
use super::identity::DeadMount;
use super::mountinfo::{FSTYPE, SUBTYPE, is_fuse, is_placeholder, mount_at};
use super::replace::{self, Detached};
use super::{MountError, MountOptions};

pub(super) const DEVICE: &str = "/dev/fuse";
const HELPER: &str = "fusermount3";
/// More dead mounts than crashes leave in one place.
const MOST_DEAD: usize = 20;
/// Where it is looked for beside the path: mount(8) may call us without any.
const USUAL: [&str; 4] = ["/usr/bin", "/bin", "/usr/local/bin", "/usr/sbin"];

/// Where the helper is that mounts for users; `None` when it is not installed.
#[must_use]
pub fn helper() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(USUAL.map(PathBuf::from));
    folders.map(|folder| folder.join(HELPER)).find(|file| file.is_file())
}

/// A directory to mount on.
#[derive(Debug)]
pub(super) struct Target {
    /// Canonical.
    pub path: PathBuf,
    /// What a killed daemon of ours left there. The new mount takes its place.
    pub dead: Option<DeadMount>,
    /// A dead mount of ours is there, or a guardian's placeholder.
    pub is_held: bool,
}

/// Makes sure that `mountpoint` is a directory that can be mounted on.
pub(super) fn check(mountpoint: &Path) -> Result<Target, MountError> {
    let bad = |why: String| MountError::Mountpoint { path: mountpoint.to_owned(), why };
    let path = match mountpoint.canonicalize() {
        Ok(path) => path,
        // A dead mount, of which the kernel remembers nothing.
        Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => {
            std::path::absolute(mountpoint).map_err(|e| bad(e.to_string()))?
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(bad("does not exist; create the directory first".into()));
        }
        Err(e) => return Err(bad(e.to_string())),
    };
    if let Some(dead) = DeadMount::at(&path).ok().flatten().filter(DeadMount::is_volume) {
        return Ok(Target { path, dead: Some(dead), is_held: true });
    }
    let there = mount_at(&path);
    if matches!(&there, Ok(Some(there)) if is_placeholder(there)) {
        return Ok(Target { path, dead: None, is_held: true });
    }
    if is_gone(&path) {
        let why = "is busy: a FUSE filesystem whose server is gone is mounted there; unmount it first \
                   (umount -l, or fusermount3 -uz)";
        return Err(bad(why.into()));
    }
    if let Ok(Some(there)) = there
        && is_fuse(&there)
    {
        return Err(bad(format!(
            "is busy: {} ({}) is mounted there; unmount it first or take another directory",
            there.source, there.fstype
        )));
    }
    if !path.metadata().map_err(|e| bad(e.to_string()))?.is_dir() {
        return Err(bad("is not a directory".into()));
    }
    Ok(Target { path, dead: None, is_held: false })
}

/// Whether a FUSE filesystem is mounted there that nobody serves any more. Does not ask for attributes, which the
/// kernel may still know. Waits for the answer of a server that lives.
#[must_use]
pub fn is_gone(path: &Path) -> bool {
    use rustix::io::Errno;
    // The second one is what a question under way gets when the server ends.
    matches!(rustix::fs::statfs(path), Err(Errno::NOTCONN | Errno::CONNABORTED))
}

/// Takes every dead mount of ours at `mountpoint` out of the tree, and a guardian's dead placeholder.
///
/// # Errors
/// What the kernel or the helper says.
pub fn remove_dead(mountpoint: &Path) -> io::Result<()> {
    for _ in 0..MOST_DEAD {
        let Some(dead) = DeadMount::at(mountpoint)? else { return Ok(()) };
        match dead.detach() {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                drop(dead);
                detach_by_helper(mountpoint, true)?;
            }
            done => done?,
        }
    }
    Ok(())
}

/// Whether more descriptors to the kernel's FUSE device can be had: each serving thread should have its own.
pub(super) fn can_open_device() -> bool {
    OpenOptions::new().read(true).write(true).open(DEVICE).is_ok()
}

/// A mount that is served and not in the tree yet.
pub(super) struct Pending {
    mount: Detached,
    dead: DeadMount,
}

impl Pending {
    /// Puts it in the place of the dead mount that it replaces.
    pub fn settle(self) -> Result<(), MountError> {
        let path = self.dead.mountpoint();
        match self.mount.take_place_of(&self.dead) {
            Ok(swap) => {
                log::info!("the mount at {} took the place of the dead one ({swap:?})", path.display());
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(MountError::Unmounted(path.to_owned())),
            Err(e) => Err(MountError::Refused { path: path.to_owned(), why: e.to_string() }),
        }
    }
}

/// Has the kernel make a mount for `target`. Returns the descriptor to serve, and what is left to do when it is served.
pub(super) fn attach(
    target: Target,
    options: &MountOptions,
) -> Result<(OwnedFd, Option<Pending>), MountError> {
    if !Path::new(DEVICE).exists() {
        return Err(MountError::NoFuse(format!("{DEVICE} is not there; load it with: modprobe fuse")));
    }
    let mountpoint = &target.path;
    match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(device) => {
            let made = target.dead.is_some().then(|| replace::make(options, &device));
            match (made, target.dead) {
                (Some(Ok(mount)), Some(dead)) => {
                    return Ok((device.into(), Some(Pending { mount, dead })));
                }
                (Some(Err(e)), _) if !matches!(e.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) => {
                    return Err(MountError::Refused { path: mountpoint.clone(), why: e.to_string() });
                }
                // Without the call that makes a detached mount: on top of the dead one.
                _ => {}
            }
            if mount_directly(mountpoint, options, &device)? {
                return Ok((device.into(), None));
            }
        }
        // The helper may have the right to open it.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
        Err(e) => return Err(MountError::NoFuse(format!("{DEVICE} cannot be opened: {e}"))),
    }
    detach_dead_by_helper(mountpoint)?;
    mount_by_helper(mountpoint, options, SUBTYPE).map(|device| (device, None))
}

/// Takes dead mounts of ours away, as the helper can only mount where it gets an answer. What shows then is the guardian's
/// placeholder; without a guardian it is the folder below, until the helper has mounted.
pub(super) fn detach_dead_by_helper(mountpoint: &Path) -> Result<(), MountError> {
    let bad = |why: String| MountError::Mountpoint { path: mountpoint.to_owned(), why };
    remove_dead(mountpoint).map_err(|e| bad(format!("is busy: a dead mount there cannot be detached: {e}")))
}

/// Mounts with mount(2); `false` when we have no right to.
fn mount_directly(mountpoint: &Path, options: &MountOptions, device: &File) -> Result<bool, MountError> {
    let failed = |e: io::Error| MountError::Refused { path: mountpoint.to_owned(), why: e.to_string() };
    // SAFETY: these calls have no preconditions.
    let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
    let mut data = format!(
        "fd={},rootmode={:o},user_id={uid},group_id={gid},default_permissions",
        device.as_raw_fd(),
        libc::S_IFDIR
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    for label in options.kernel_labels() {
        // The kernel takes values with commas in quotes.
        match label.split_once('=') {
            Some((key, value)) => data.push_str(&format!(",{key}=\"{value}\"")),
            None => data.push_str(&format!(",{label}")),
        }
    }
    let text = |s: &[u8]| CString::new(s).map_err(|e| failed(e.into()));
    let (source, target) = (text(options.fsname.as_bytes())?, text(mountpoint.as_os_str().as_bytes())?);
    let (fstype, data) = (text(FSTYPE.as_bytes())?, text(data.as_bytes())?);
    // SAFETY: all pointers are to NUL-terminated strings that outlive the call.
    let done = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            fstype.as_ptr(),
            mount_flags(options),
            data.as_ptr().cast(),
        )
    };
    if done == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EPERM) => Ok(false),
        Some(libc::ENODEV) => {
            Err(MountError::NoFuse("the kernel has no FUSE; load it: modprobe fuse".into()))
        }
        _ => Err(failed(error)),
    }
}

fn mount_flags(options: &MountOptions) -> libc::c_ulong {
    let mut flags = 0;
    for (on, flag) in [
        (options.read_only, libc::MS_RDONLY),
        (!options.suid, libc::MS_NOSUID),
        (!options.dev, libc::MS_NODEV),
        (options.noexec, libc::MS_NOEXEC),
        (options.noatime, libc::MS_NOATIME),
        (options.nosymfollow, libc::MS_NOSYMFOLLOW),
        (options.sync, libc::MS_SYNCHRONOUS),
        (options.dirsync, libc::MS_DIRSYNC),
        (options.strictatime, libc::MS_STRICTATIME),
        (options.nodiratime, libc::MS_NODIRATIME),
    ] {
        if on {
            flags |= flag;
        }
    }
    flags
}

/// Gives the mount at `mountpoint` these flags instead of those it has. What FUSE cannot change (`allow_other`, the source) stays,
/// and so does what `options` does not say about access times: that needs `atime`.
///
/// # Errors
/// What mount(2) answers: `ResourceBusy` when it is to be read-only and something is open for writing, `PermissionDenied`
/// without root.
pub fn remount(mountpoint: &Path, options: &MountOptions, atime: bool) -> io::Result<()> {
    let target = CString::new(mountpoint.as_os_str().as_bytes())?;
    let mut flags = mount_flags(options) | libc::MS_REMOUNT;
    if atime {
        flags |= libc::MS_RELATIME;
    }
    // SAFETY: the string outlives the call; a remount takes no source and no type, and FUSE no data.
    let done =
        unsafe { libc::mount(std::ptr::null(), target.as_ptr(), std::ptr::null(), flags, std::ptr::null()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The options in the words of the helper.
fn helper_options(options: &MountOptions, subtype: &str) -> OsString {
    // The helper takes a backslash before a comma or a backslash.
    let name = options.fsname.replace('\\', "\\\\").replace(',', "\\,");
    let mut words =
        vec![format!("fsname={name}"), format!("subtype={subtype}"), "default_permissions".into()];
    for (on, word) in [
        (options.allow_other, "allow_other"),
        (options.read_only, "ro"),
        (options.suid, "suid"),
        (options.dev, "dev"),
        (options.noexec, "noexec"),
        (options.noatime, "noatime"),
        (options.sync, "sync"),
        (options.dirsync, "dirsync"),
    ] {
        if on {
            words.push(word.into());
        }
    }
    words.join(",").into()
}

/// Lets `fusermount3` mount and hand over the descriptor through a socket.
pub(super) fn mount_by_helper(
    mountpoint: &Path,
    options: &MountOptions,
    subtype: &str,
) -> Result<OwnedFd, MountError> {
    let failed = |why: String| MountError::Refused { path: mountpoint.to_owned(), why };
    let (ours, theirs) = UnixStream::pair().map_err(|e| failed(e.to_string()))?;
    let inherited = theirs.as_raw_fd();
    let mut command = Command::new(helper().ok_or(MountError::NoHelper)?);
    command.arg("-o").arg(helper_options(options, subtype)).arg("--").arg(mountpoint);
    command.env("_FUSE_COMMFD", inherited.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: only fcntl, which may be called between fork and exec, on a descriptor that `theirs` keeps open.
    unsafe {
        command.pre_exec(move || match libc::fcntl(inherited, libc::F_SETFD, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut child = command.spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => MountError::NoHelper,
        _ => failed(format!("{HELPER}: {e}")),
    })?;
    drop(theirs);
    let received = receive_descriptor(&ours);
    let mut told = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        // Whatever it says is only for the message.
        let _ = stderr.read_to_string(&mut told);
    }
    let status = child.wait().map_err(|e| failed(e.to_string()))?;
    match received {
        Ok(Some(fd)) if status.success() => Ok(fd),
        Err(e) => Err(failed(e.to_string())),
        _ => Err(failed(explain(told.trim().trim_start_matches("fusermount3: ")))),
    }
}

/// What the helper said, with the remedy where we know it.
fn explain(told: &str) -> String {
    let remedy = if told.contains(DEVICE) && told.contains("Permission denied") {
        "; users need access to the device (chmod 666 /dev/fuse), or mount as root"
    } else if told.contains("user_allow_other") {
        "; add that line to /etc/fuse.conf, or leave out allow_other"
    } else {
        ""
    };
    format!("{told}{remedy}")
}

/// The descriptor that comes with the next message; `None` when the other side closes without one.
fn receive_descriptor(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = 0_u8;
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // Room for one descriptor with its header, aligned as a header must be.
    let mut control = [0_u64; 8];
    loop {
        // SAFETY: all zeros is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: `message` points to one buffer of one byte and a control buffer of the length given.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        if got < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        if got == 0 {
            return Ok(None);
        }
        // SAFETY: `message` was filled by recvmsg; the first header is checked for null, level, type and length
        // before the descriptor behind it is read, and that descriptor is ours alone.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            if header.is_null()
                || (*header).cmsg_level != libc::SOL_SOCKET
                || (*header).cmsg_type != libc::SCM_RIGHTS
                || ((*header).cmsg_len as usize) < libc::CMSG_LEN(4) as usize
            {
                return Ok(None);
            }
            let fd = libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned();
            return Ok((fd >= 0).then(|| OwnedFd::from_raw_fd(fd)));
        }
    }
}

/// Unmounts; `lazy` takes the mount out of the tree at once and lets it end when the last user is gone.
pub(super) fn detach(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let path = CString::new(mountpoint.as_os_str().as_bytes())?;
    let flags = libc::UMOUNT_NOFOLLOW | if lazy { libc::MNT_DETACH } else { 0 };
    let error = match apart::umount(&path, flags) {
        Ok(()) => return Ok(()),
        Err(e) => e,
    };
    if error.raw_os_error() != Some(libc::EPERM) {
        return Err(error);
    }
    detach_by_helper(mountpoint, lazy)
}

/// The same through `fusermount3`, which may detach what its caller has mounted.
pub(super) fn detach_by_helper(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let how = OsStr::new(if lazy { "-uz" } else { "-u" });
    let program = helper().ok_or(io::ErrorKind::PermissionDenied)?;
    let output = Command::new(program).arg(how).arg("--").arg(mountpoint).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let told = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let kind = if told.contains("busy") { io::ErrorKind::ResourceBusy } else { io::ErrorKind::Other };
    Err(io::Error::new(kind, told))
}

/// Whether requests of the kernel wait to be read from `fd`.
pub(super) fn has_requests(fd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd, no waiting.
    let n = unsafe { libc::poll(&raw mut poll, 1, 0) };
    n > 0 && poll.revents & libc::POLLIN != 0
}

/// Whether the kernel still serves `fd`'s mount.
pub(super) fn is_attached(fd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one valid pollfd, no waiting.
    let n = unsafe { libc::poll(&raw mut poll, 1, 0) };
    n == 0 || (n > 0 && poll.revents & libc::POLLERR == 0)
}
