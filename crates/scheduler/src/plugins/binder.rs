//! DefaultBinder: writes the decision as a Binding. The writing itself is I/O and lies in `writes`; without this plugin
//! (and without an extender that binds) a profile decides but binds nothing, which the configuration refuses.

use super::{Plugin, Point};

pub const PLUGIN: Plugin = Plugin { name: "DefaultBinder", points: &[Point::Bind], ..Plugin::NONE };
