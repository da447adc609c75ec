//! Which node runs a pod.
