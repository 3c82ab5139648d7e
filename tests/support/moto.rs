//! moto's S3, which checks signatures and policies, when it is installed.
//!
//! Owns its process, one user with one key pair, and one bucket. Found through `MIRRORFS_MOTO` (the program `moto_server`) or in `PATH`;
//! where it is absent a test says so and goes on without. Objects are in memory: a killed one comes back empty.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use mirrorfs::replica::ReplicaSpec;

use super::process::{Process, free_addr, wait_listening};

/// The bucket that exists.
pub const BUCKET: &str = "bucket";
const USER: &str = "tester";
/// With this seed moto makes the same key pair again.
const SEED: u32 = 42;
const POLICY: &str = "%7B%22Version%22%3A%222012-10-17%22%2C%22Statement%22%3A%5B%7B%22Effect%22%3A%22Allow%22%2C\
                      %22Action%22%3A%22s3%3A%2A%22%2C%22Resource%22%3A%22%2A%22%7D%5D%7D";

/// Starts moto. It would decode the query before it checks the signature over it, and refuse each `/` that is encoded as it must be.
const START: &str = "
import sys, flask
from moto.iam import access_control
from moto.server import main
make = access_control.IAMRequestBase._create_aws_request
def make_as_it_was_sent(self):
    self._path = flask.request.environ['RAW_URI']
    return make(self)
access_control.IAMRequestBase._create_aws_request = make_as_it_was_sent
main(sys.argv[1:])
";

/// A running moto.
pub struct Moto {
    program: PathBuf,
    process: Process,
    addr: SocketAddr,
    access: String,
    secret: String,
}

impl Moto {
    /// Starts it with its user, key and bucket, or says visibly that it is not installed.
    pub fn start(test: &str) -> Option<Self> {
        let Some(program) = find() else {
            eprintln!(
                "SKIPPED: {test}: moto is not installed (pip install 'moto[server]', or set MIRRORFS_MOTO)"
            );
            return None;
        };
        let addr = free_addr();
        let process = spawn(&program, addr);
        let mut moto = Self { program, process, addr, access: String::new(), secret: String::new() };
        moto.set_up();
        Some(moto)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Stops it where it stands, or lets it go on.
    pub fn hang(&self, hang: bool) {
        self.process.hang(hang);
    }

    /// Kills it. What it held is gone.
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// Starts it again on the same port, with the same key pair and an empty bucket. Nobody else may talk to it meanwhile.
    pub fn restart(&mut self) {
        self.kill9();
        self.process = spawn(&self.program, self.addr);
        let before = (self.access.clone(), self.secret.clone());
        self.set_up();
        assert_eq!((self.access.clone(), self.secret.clone()), before, "moto makes other keys");
    }

    /// Takes the key pair away from its user.
    pub fn delete_key(&self) {
        self.as_administrator(|| {
            self.iam("DeleteAccessKey", &format!("&AccessKeyId={}", self.access));
        });
    }

    /// Gives it back. Nobody else may talk to it meanwhile.
    pub fn create_key(&mut self) {
        let mut key = None;
        self.as_administrator(|| key = Some(self.new_key()));
        assert_eq!(key, Some((self.access.clone(), self.secret.clone())), "moto makes other keys");
    }

    /// A replica on it, reached through `endpoint`, below `prefix`, with more options.
    pub fn spec(&self, name: &str, endpoint: &str, prefix: &str, more: &[(&str, &str)]) -> ReplicaSpec {
        let mut options = vec![
            ("endpoint", endpoint),
            ("access_key_id", &self.access),
            ("secret_access_key", &self.secret),
            ("region", "us-east-1"),
            ("allow_http", "true"),
        ];
        options.extend(more);
        super::spec(name, &format!("s3://{BUCKET}/{prefix}"), &options)
    }

    /// The four requests that need no signature.
    fn set_up(&mut self) {
        wait_listening(self.addr, "moto");
        self.iam("CreateUser", "");
        (self.access, self.secret) = self.new_key();
        self.iam("PutUserPolicy", &format!("&PolicyName=all&PolicyDocument={POLICY}"));
        let answer = self.request("PUT", &format!("/{BUCKET}"), "");
        assert!(answer.starts_with("HTTP/1.1 200"), "moto refuses the bucket: {answer}");
    }

    fn new_key(&self) -> (String, String) {
        self.request("POST", &format!("/moto-api/seed?a={SEED}"), "");
        let answer = self.iam("CreateAccessKey", "");
        (element(&answer, "AccessKeyId"), element(&answer, "SecretAccessKey"))
    }

    /// Does something while no request is checked.
    fn as_administrator(&self, what: impl FnOnce()) {
        let check_after = |n: &str| {
            let answer = self.request("POST", "/moto-api/reset-auth", n);
            assert!(answer.starts_with("HTTP/1.1 200"), "moto does not reset: {answer}");
        };
        check_after("inf");
        what();
        check_after("0");
    }

    fn iam(&self, action: &str, more: &str) -> String {
        let body = format!("Action={action}&UserName={USER}&Version=2010-05-08{more}");
        let answer = self.request("POST", "/", &body);
        assert!(answer.starts_with("HTTP/1.1 200"), "moto refuses {action}: {answer}");
        answer
    }

    fn request(&self, method: &str, path: &str, body: &str) -> String {
        // moto finds the service by this header; it checks nothing of it yet.
        let auth = "AWS4-HMAC-SHA256 Credential=x/20200101/us-east-1/iam/aws4_request, SignedHeaders=host, Signature=x";
        let auth = match path {
            "/" => format!("Authorization: {auth}\r\nContent-Type: application/x-www-form-urlencoded\r\n"),
            _ => String::new(),
        };
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\n{auth}Content-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            self.addr,
            body.len()
        );
        let mut stream = TcpStream::connect(self.addr).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

fn spawn(program: &Path, addr: SocketAddr) -> Process {
    // The interpreter beside the program knows the program's packages.
    let mut command = Command::new(program.with_file_name("python"));
    command.args(["-c", START, "-H", "127.0.0.1", "-p", &addr.port().to_string()]);
    command.env("INITIAL_NO_AUTH_ACTION_COUNT", "4").env("MOTO_PORT", addr.port().to_string());
    Process::start(&mut command)
}

fn element(text: &str, name: &str) -> String {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let from = text.find(&open).unwrap_or_else(|| panic!("no {name} in {text}")) + open.len();
    let to = text[from..].find(&close).unwrap() + from;
    text[from..to].to_owned()
}

fn find() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("MIRRORFS_MOTO") {
        return Some(given.into());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("moto_server")).find(|p| p.is_file())
}
