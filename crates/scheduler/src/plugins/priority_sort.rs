//! PrioritySort: pods of higher priority are tried first, of equals the one that waits longer. The queue keeps this
//! order itself; upstream allows no other plugin here but one per process, and neither do we.

use super::{Plugin, Point};

pub const PLUGIN: Plugin = Plugin { name: "PrioritySort", points: &[Point::QueueSort], ..Plugin::NONE };
