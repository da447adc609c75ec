//! The revisioned, watchable key-value store.
