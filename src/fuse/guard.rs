//! Keeps a panic in one request from taking the mount with it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::trace;

/// Runs `work`; a panic in it is logged and ends there. A reply that it held is dropped while unwinding, and a dropped
/// reply answers EIO: so the application gets an error, never silence.
pub(super) fn guarded(what: &'static str, work: impl FnOnce()) {
    guarded_since(what, None, work);
}

/// [`guarded`], for work that has waited for a thread since `queued`.
pub(super) fn guarded_since(what: &'static str, queued: Option<Instant>, work: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| trace::request(what, queued, work))) {
        let text = payload
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_owned());
        log::error!("{what} panicked: {text}; answered EIO. This is a bug, please report it");
    }
}
