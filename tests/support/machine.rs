//! A machine between which and the replicas there is a network that fails at command.

use std::path::Path;
use std::sync::atomic::Ordering;

use super::mount::Volume;
use super::proxy::Proxy;
use super::run::Ran;
use super::s3::{BUCKET, S3Server};

/// A machine with a network of its own between it and the replicas.
pub struct Machine {
    /// Its volume: state folders and mountpoints.
    pub v: Volume,
    /// One before each server, in their order.
    pub proxies: Vec<Proxy>,
}

impl Machine {
    /// One that knows the servers as replicas `one` and `two`; `settings` are lines of its configuration. `None`, visibly, without FUSE.
    pub fn new(test: &str, servers: &[S3Server], settings: &[&str]) -> Option<Self> {
        let mut v = Volume::new(test)?;
        let mut proxies = Vec::new();
        for (server, name) in servers.iter().zip(["one", "two"]) {
            let proxy = Proxy::start(server.http.addr());
            let mut options = S3Server::options(&proxy.url());
            options.push(("timeout".into(), "3s".into()));
            let options: Vec<_> = options.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            v.replica(name, &format!("s3://{BUCKET}/mirror"), &options);
            proxies.push(proxy);
        }
        settings.iter().for_each(|line| v.setting(line));
        Some(Self { v, proxies })
    }

    /// Cuts it off, or joins it again.
    pub fn cut(&self, off: bool) {
        self.proxies.iter().for_each(|p| p.faults.blackhole.store(off, Ordering::Relaxed));
    }

    /// Saves what its state folder holds into `to`.
    pub fn salvage(&self, to: &Path, more: &[&str]) -> Ran {
        let state = self.v.path("state");
        let words = ["salvage", "--state", state.to_str().unwrap(), "--to", to.to_str().unwrap()];
        self.v.run(&[], &[&words[..], more].concat())
    }
}

/// Two servers, so that one of them may fail.
pub fn servers() -> Vec<S3Server> {
    vec![S3Server::start(), S3Server::start()]
}
