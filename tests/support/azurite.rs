//! Azurite, Microsoft's emulator of Azure blob storage, when it is installed.
//!
//! Owns its process and folder. Found through `MIRRORFS_AZURITE` (its `main.js` of the blob service) or in `node_modules` beside
//! `Cargo.toml`; where it is absent a test says so and passes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use mirrorfs::replica::{ReplicaSpec, Store};

use super::process::{Process, free_addr, wait_listening};

/// The emulator's public, documented account and key.
pub const ACCOUNT: &str = "devstoreaccount1";
/// Its key.
pub const KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
/// The container that exists.
pub const CONTAINER: &str = "container";

/// A running azurite with one container, empty at first.
pub struct Azurite {
    script: PathBuf,
    process: Process,
    addr: SocketAddr,
    dir: tempfile::TempDir,
}

impl Azurite {
    /// Starts it, or says visibly that it is not installed.
    pub fn start(test: &str) -> Option<Self> {
        let Some(script) = find() else {
            eprintln!("SKIPPED: {test}: azurite is not installed (npm i azurite, or set MIRRORFS_AZURITE)");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        let addr = free_addr();
        let process = spawn(&script, addr, dir.path());
        let started = Self { script, process, addr, dir };
        let deadline = Instant::now() + Duration::from_secs(30);
        while started.create_container().is_none() {
            assert!(Instant::now() < deadline, "azurite does not start");
            std::thread::sleep(Duration::from_millis(100));
        }
        Some(started)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Stops it where it stands, or lets it go on.
    pub fn hang(&self, hang: bool) {
        self.process.hang(hang);
    }

    /// Kills it. What it has not written to its index within the last seconds is forgotten.
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// Starts it again on the same port, over the same folder.
    pub fn restart(&mut self) {
        self.kill9();
        self.process = spawn(&self.script, self.addr, self.dir.path());
        wait_listening(self.addr, "azurite");
    }

    /// A replica on it, below `prefix`, with more options.
    pub fn spec(&self, name: &str, prefix: &str, more: &[(&str, &str)]) -> ReplicaSpec {
        let endpoint = format!("http://{}/{ACCOUNT}", self.addr);
        let mut options =
            vec![("account", ACCOUNT), ("account_key", KEY), ("endpoint", &endpoint), ("allow_http", "true")];
        options.retain(|(k, _)| !more.iter().any(|(m, _)| m == k));
        options.extend(more);
        super::spec(name, &format!("az://{CONTAINER}/{prefix}"), &options)
    }

    /// The store of such a replica.
    pub fn store(&self, prefix: &str) -> Store {
        self.spec("azure", prefix, &[]).store().unwrap()
    }

    /// Creates the container by a signed request; `None` while nobody answers.
    fn create_container(&self) -> Option<()> {
        let (date, version) = ("Fri, 20 Nov 2020 12:00:00 GMT", "2021-08-06");
        let to_sign = format!(
            "PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:{version}\n\
             /{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
        );
        let key = BASE64_STANDARD.decode(KEY).unwrap();
        let mut mac = Hmac::<sha2::Sha256>::new_from_slice(&key).unwrap();
        mac.update(to_sign.as_bytes());
        let signature = BASE64_STANDARD.encode(mac.finalize().into_bytes());
        let request = format!(
            "PUT /{ACCOUNT}/{CONTAINER}?restype=container HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\n\
             x-ms-date: {date}\r\nx-ms-version: {version}\r\n\
             Authorization: SharedKey {ACCOUNT}:{signature}\r\nConnection: close\r\n\r\n",
            self.addr
        );
        let mut stream = TcpStream::connect(self.addr).ok()?;
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        assert!(answer.starts_with("HTTP/1.1 201"), "azurite refuses the container: {answer}");
        Some(())
    }
}

fn spawn(script: &Path, addr: SocketAddr, dir: &Path) -> Process {
    let mut command = Command::new("node");
    command.arg(script).args(["--blobHost", "127.0.0.1", "--blobPort", &addr.port().to_string()]);
    command.arg("--location").arg(dir);
    command.args(["--silent", "--skipApiVersionCheck", "--disableTelemetry"]);
    Process::start(&mut command)
}

fn find() -> Option<PathBuf> {
    let given = std::env::var_os("MIRRORFS_AZURITE").map(PathBuf::from);
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("node_modules/azurite/dist/src/blob/main.js");
    given.into_iter().chain([beside]).find(|p| p.is_file())
}
