//! Work that nobody waits for gives way to work that somebody waits for.
//!
//! Owns by how much. Knows no thread: each says for itself.

/// Nice value added: a third of the share of processor time that others get, where there is not enough for all.
const STEP: i32 = 5;

/// From now on this thread gives way to others. It goes on all the same when the system refuses.
pub fn give_way() {
    // Linux has a nice value for each thread.
    if let Err(e) = rustix::process::nice(STEP) {
        log::debug!("a background thread keeps its priority: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_gives_way_and_others_do_not() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        let within = std::thread::spawn(move || {
            give_way();
            nice()
        });
        assert_eq!(within.join().unwrap(), (before + STEP).min(19));
        assert_eq!(nice(), before);
    }
}
