//! The control loops, one module each.
