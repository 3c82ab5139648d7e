//! Access control lists.

use crate::Run;

pub const CASES: &[(&str, Run)] = &[];
